"""Sampling parameters to TensorRT-LLM's `SamplingParams`, one by one.

The names and meanings were read in `tensorrt_llm/sampling_params.py` (1.3). Greedy decoding is
`top_k=1`, which is greedy in every release; for drawing `top_p` is always given, since older releases
take its absence for greedy.

Penalties and `min_p` have fields there too, which the sampler of the PyTorch backend did not look at until
July 2026 (TensorRT-LLM #16485 and #16590): in a release that ignores them an answer would say nothing of it.
`embedding_bias` wants a row of the exact length of the logits, and a wrong length fails other requests of the
same step. So these are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.checks import (
    GREEDY_BELOW,
    check_no_prompt_logprobs,
    check_one_choice,
    check_sampling,
)
from trtllm_mm_cache.engines.grammar import WHAT, check_alone, grammar_of
from trtllm_mm_cache.errors import InvalidRequestError

_UNSERVED: Mapping[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "logit_bias": {},
}


def engine_sampling(sampling: SamplingParams, room: int) -> dict[str, Any]:
    """Return the keyword arguments of TensorRT-LLM's `SamplingParams`; `room` bounds the answer's tokens.

    The engine does not detokenise, the frontend does, and tokens of a stop string are emitted, as the
    frontend trims them. Raises `InvalidRequestError` for a value or a combination the engine cannot serve.
    """
    check_sampling(sampling)
    check_one_choice(sampling)
    check_no_prompt_logprobs(sampling)
    if sampling.ignore_eos and (sampling.stop or sampling.stop_token_ids):
        # The executor request then gets an empty list of stop words, whatever else was asked for.
        raise InvalidRequestError(
            "ignore_eos together with stop or stop_token_ids: TensorRT-LLM ignores the latter then; "
            "leave one out"
        )
    for name, off in _UNSERVED.items():
        if getattr(sampling, name) != off:
            raise InvalidRequestError(
                f"{name} is not served with TensorRT-LLM: leave it out, or use a server with the "
                "transformers engine"
            )
    if sampling.seed is not None and sampling.seed < 0:
        raise InvalidRequestError("seed must not be negative with TensorRT-LLM")
    wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    arguments: dict[str, Any] = {
        "max_tokens": wanted,
        "detokenize": False,
        "include_stop_str_in_output": True,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.min_tokens:
        arguments["min_tokens"] = min(sampling.min_tokens, wanted)
    if sampling.stop:
        arguments["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        arguments["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logprobs is not None:
        # The chosen token's comes with any number from 1, and with 0 not in every release.
        arguments["logprobs"] = max(1, sampling.logprobs)
    return arguments | _choice(sampling)


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.temperature is None or sampling.temperature < GREEDY_BELOW:
        return {"top_k": 1}
    choice: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
    }
    if sampling.top_k is not None and sampling.top_k > 0:
        choice["top_k"] = sampling.top_k
    if sampling.seed is not None:
        choice["seed"] = sampling.seed
    return choice


def engine_guide(sampling: SamplingParams, backend: str | None) -> dict[str, Any] | None:
    """Return the keyword arguments of TensorRT-LLM's `GuidedDecodingParams`; None without a constraint.

    The engine compiles it in its own process, for all requests; so what cannot be read is refused here.
    Raises `InvalidRequestError`, also where the engine was loaded without a `backend` for it.
    """
    constraint = sampling.constraint
    if constraint is None:
        return None
    if backend is None:
        raise InvalidRequestError(
            f"{WHAT} is not served here: the engine's YAML file has no guided_decoding_backend"
        )
    check_alone(sampling)
    grammar_of(constraint)
    return {"json" if constraint.kind == "json_schema" else "regex": constraint.text}
