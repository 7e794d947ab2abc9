"""What an answer must be, as a grammar of llguidance: both engines refuse what it cannot read.

The library bounds what a grammar may cost to read and to follow.
"""

from __future__ import annotations

import json
from typing import Any

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.errors import InvalidRequestError

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of JSON. Without a bound a model can go on with spaces for ever."""

WHAT = "structured output (response_format, guided_json, guided_regex, guided_choice)"


def import_llguidance() -> Any:
    """Return the library; raises `InvalidRequestError` where it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise InvalidRequestError(f"{WHAT} is not served here: the package llguidance is missing") from error
    return llguidance


def grammar_of(constraint: Constraint) -> str:
    """Return the grammar of `constraint`, in the library's form. Blocking: milliseconds.

    Raises `InvalidRequestError` when it is no schema or pattern, or a too complex one.
    """
    matcher = import_llguidance().LLMatcher
    if constraint.kind == "regex":
        grammar = str(matcher.grammar_from_regex(constraint.text))
    else:
        options = {"whitespace_pattern": WHITESPACE}
        grammar = str(matcher.grammar_from_json_schema(_schema(constraint.text), overrides=options))
    if problem := matcher.validate_grammar(grammar):
        raise refusal(problem)
    return grammar


def _schema(text: str) -> dict[str, Any]:
    """Return a schema; the library would take any text for a part of a grammar."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{WHAT}: the schema must be a JSON object")
    return schema


def check_alone(sampling: SamplingParams) -> None:
    """Raise `InvalidRequestError` for options that speak against an answer that ends by itself."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(sampling, name):
            raise InvalidRequestError(f"{WHAT} ends the answer by itself: leave {name} out")


def refusal(problem: str) -> InvalidRequestError:
    """Return the error for a constraint that the library cannot follow, for its own reason."""
    reason = fit_for_client(ValueError(problem), "it is not valid, or too complex")
    return InvalidRequestError(f"{WHAT} cannot follow this schema or pattern: {reason}")
