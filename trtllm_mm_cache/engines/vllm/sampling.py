"""Sampling parameters to vLLM's `SamplingParams`, one by one.

The names and meanings were read in `vllm/sampling_params.py` (0.32). vLLM's own defaults are not the API's
(`max_tokens` 16, `temperature` 1), so both are always given.
"""

from __future__ import annotations

import json
from typing import Any

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.engines.checks import GREEDY_BELOW, check_sampling
from trtllm_mm_cache.engines.grammar import WHITESPACE, check_alone, grammar_of
from trtllm_mm_cache.errors import InvalidRequestError

_HOTTEST = 2.0


def engine_sampling(sampling: SamplingParams, room: int, vocabulary: int) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's `SamplingParams`; `room` bounds the answer's tokens.

    vLLM sees the answer's text only to find stop strings in it; the tokens of one are emitted, as the
    frontend trims them. Raises `InvalidRequestError` for a value or a combination that vLLM cannot serve.
    """
    check_sampling(sampling)
    for token_id in sampling.logit_bias:
        if not 0 <= token_id < vocabulary:
            raise InvalidRequestError(f"logit_bias: token id {token_id} is outside the vocabulary")
    wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    arguments: dict[str, Any] = {
        "n": sampling.choices,
        "max_tokens": wanted,
        "min_tokens": min(sampling.min_tokens, wanted),
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),
        "include_stop_str_in_output": True,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        # Lists of numbers for a prompt, instead of an object for each log probability.
        "flat_logprobs": sampling.prompt_logprobs is not None,
    }
    return arguments | _choice(sampling)


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.temperature is None or sampling.temperature < GREEDY_BELOW:
        if sampling.choices > 1:
            raise InvalidRequestError(
                "n: with temperature 0 all answers would be the same; set a temperature, or leave n out"
            )
        return {"temperature": 0.0}
    if sampling.temperature > _HOTTEST:
        raise InvalidRequestError(f"temperature must be from 0 to {_HOTTEST:g} with vLLM")
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "top_k": max(0, sampling.top_k or 0),
        "min_p": sampling.min_p,
        # vLLM takes -1 for no seed, and 63 bits: every other number stands for itself.
        "seed": None if sampling.seed is None else sampling.seed & (2**63 - 1),
    }


def engine_constraint(sampling: SamplingParams) -> dict[str, Any] | None:
    """Return the keyword arguments of vLLM's `StructuredOutputsParams`; None without a constraint.

    EngineCore compiles it, for all requests; so what cannot be read, or costs too much, is refused here.
    Raises `InvalidRequestError`.
    """
    constraint = sampling.constraint
    if constraint is None:
        return None
    check_alone(sampling)
    grammar_of(constraint)
    return {"regex": constraint.text} if constraint.kind == "regex" else {"json": _bounded(constraint)}


def _bounded(constraint: Constraint) -> str:
    """Return the schema with the bound on blanks written into it: guidance reads its options there."""
    schema = json.loads(constraint.text)
    options = schema.get("x-guidance")
    options = options if isinstance(options, dict) else {}
    return json.dumps(schema | {"x-guidance": options | {"whitespace_pattern": WHITESPACE}})
