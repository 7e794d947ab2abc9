"""How a request wants its answer: sampling, ends, log probabilities, and what the answer must be.

The field names are Dynamo 1.6.1's, and `logit_bias` ours; what clients call them is the frontend's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.engines.checks import MOST_CHOICES, MOST_LOGPROBS
from trtllm_mm_cache.errors import InvalidRequestError

_Integer = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Penalty = Annotated[_Number, Field(ge=-2, le=2)]
_Bias = Annotated[_Number, Field(ge=-100, le=100)]
_StopText = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
TokenIds = Annotated[list[TokenId], Field(max_length=4096)]

LENIENT = ConfigDict(frozen=True, extra="ignore")
"""Fields we read are typed; fields of newer frontends pass."""

_MAX_BIASES = 1024
_MAX_CONSTRAINT_CHARACTERS = 65536

# Options that change the answer and that no engine here implements. A value equal to the one
# named means "off", as clients send it.
_UNSERVED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
}


class StopConditions(BaseModel):
    """What ends an answer."""

    model_config = LENIENT

    max_tokens: Annotated[_Integer, Field(ge=1)] | None = None
    min_tokens: Annotated[_Integer, Field(ge=0)] | None = None
    stop: list[_StopText] | None = Field(None, max_length=64)
    stop_token_ids: TokenIds | None = None
    stop_token_ids_visible: TokenIds | None = None
    stop_token_ids_hidden: TokenIds | None = None
    ignore_eos: StrictBool | None = None


class SamplingOptions(BaseModel):
    """How tokens are chosen; options that are not served are kept, to be refused by name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    temperature: Annotated[_Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[_Integer, Field(ge=-1)] | None = None
    seed: _Integer | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=100)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    logit_bias: dict[Any, _Bias] | None = Field(None, max_length=_MAX_BIASES)
    guided_decoding: dict[str, Any] | None = None
    n: Annotated[_Integer, Field(ge=1, le=MOST_CHOICES)] | None = None


class OutputOptions(BaseModel):
    """What is told beside the tokens."""

    model_config = LENIENT

    logprobs: Annotated[_Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[_Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None


def read_sampling(
    options: SamplingOptions, stop: StopConditions, output: OutputOptions, eos_token_ids: Sequence[int]
) -> SamplingParams:
    """Return what the engine is told; raises `InvalidRequestError` that names what is not served."""
    for name, off in _UNSERVED.items():
        value = (options.model_extra or {}).get(name)
        if value not in off:
            raise InvalidRequestError(f"{name}: this server does not implement it; leave it out")
    stop_ids = {
        *(stop.stop_token_ids or ()),
        *(stop.stop_token_ids_visible or ()),
        *(stop.stop_token_ids_hidden or ()),
    }
    stop_ids = stop_ids - set(eos_token_ids) if stop.ignore_eos else stop_ids | set(eos_token_ids)
    return SamplingParams(
        max_tokens=stop.max_tokens,
        min_tokens=stop.min_tokens or 0,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k if options.top_k and options.top_k > 0 else None,
        seed=options.seed,
        stop=tuple(stop.stop or ()),
        stop_token_ids=tuple(sorted(stop_ids)),
        ignore_eos=bool(stop.ignore_eos),
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=1.0 if options.repetition_penalty is None else options.repetition_penalty,
        min_p=options.min_p or 0.0,
        logit_bias=_logit_bias(options.logit_bias or {}),
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        constraint=_constraint(options.guided_decoding or {}),
        choices=options.n or 1,
    )


def _logit_bias(given: Mapping[Any, float]) -> dict[int, float]:
    """Return the biases that are not 0. A token id may be text: JSON has no other keys."""
    bias = {}
    for key, value in given.items():
        text = str(key)
        if isinstance(key, bool) or not (text.isascii() and text.isdecimal() and len(text) <= 10):
            raise InvalidRequestError("logit_bias: its keys must be token ids")
        if value:
            bias[int(text)] = value
    return bias


def _constraint(guided: Mapping[str, Any]) -> Constraint | None:
    """Read what an answer must be; of Dynamo's ways to say it those that both engines can follow."""
    given = {name: value for name, value in guided.items() if value is not None and value is not False}
    if not given:
        return None
    if len(given) > 1 or (name := next(iter(given))) not in ("json", "json_object", "regex", "choice"):
        names = ", ".join(f"guided_{name}" for name in sorted(given))[:80]
        raise InvalidRequestError(
            f"{names}: of structured output, one of response_format, guided_json, guided_regex and "
            "guided_choice is served"
        )
    constraint = _constraint_of(name, given[name])
    if len(constraint.text) > _MAX_CONSTRAINT_CHARACTERS:
        raise InvalidRequestError(f"guided_{name}: must have at most {_MAX_CONSTRAINT_CHARACTERS} characters")
    return constraint


def _constraint_of(name: str, value: Any) -> Constraint:
    match name, value:
        case "json", str():
            return Constraint("json_schema", value)
        case "json", dict():
            return Constraint("json_schema", _dumped(value))
        case "json_object", True:
            return Constraint("json_schema", '{"type": "object"}')
        case "regex", str():
            return Constraint("regex", value)
        case "choice", [_, *_] if all(isinstance(text, str) and text for text in value):
            return Constraint("regex", "|".join(map(re.escape, value)))
    raise InvalidRequestError(f"guided_{name}: has a value of another form")


def _dumped(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequestError("guided_json: must be JSON, and not nested this deep") from error
