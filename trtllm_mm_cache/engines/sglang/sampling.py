"""Sampling parameters to SGLang's, one by one.

The names and meanings were read in `sglang/srt/sampling/sampling_params.py` and `layers/sampler.py` (0.5.23).
SGLang's own defaults are not the API's (`max_new_tokens` 128, `temperature` 1), so both are always given.
What SGLang would ignore, cut or answer otherwise than the API says is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.checks import GREEDY_BELOW, check_no_prompt_logprobs, check_sampling
from trtllm_mm_cache.engines.grammar import check_alone, grammar_of
from trtllm_mm_cache.errors import InvalidRequestError

MOST_STOP_STRINGS: Final = 32
MOST_REPETITION_PENALTY: Final = 2.0


def engine_sampling(
    sampling: SamplingParams, room: int, vocabulary: int, *, deterministic: bool
) -> list[dict[str, Any]]:
    """Return the `sampling_params` of each of the request's choices; `room` bounds an answer's tokens.

    `deterministic` says that SGLang heeds seeds; the choices of one request then have seeds that follow each
    other. The tokens of a stop string are emitted, as the frontend trims them.
    Raises `InvalidRequestError` for a value or a combination that SGLang cannot serve.
    """
    check_sampling(sampling)
    check_no_prompt_logprobs(sampling)
    _check_limits(sampling, vocabulary, deterministic)
    wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    arguments: dict[str, Any] = {
        "max_new_tokens": wanted,
        "min_new_tokens": min(sampling.min_tokens, wanted),
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop),
        "no_stop_trim": True,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        **_constraint(sampling),
    }
    return [arguments | _choice(sampling, index) for index in range(sampling.choices)]


def _choice(sampling: SamplingParams, index: int) -> dict[str, Any]:
    if _is_greedy(sampling):
        return {"temperature": 0.0}
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k and sampling.top_k > 0 else -1,
        "min_p": sampling.min_p,
        "sampling_seed": None if sampling.seed is None else _signed(sampling.seed + index),
    }


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature is None or sampling.temperature < GREEDY_BELOW


def _signed(seed: int) -> int:
    """Return the seed as a signed number of 64 bits: every other number stands for itself."""
    return (seed + 2**63) % 2**64 - 2**63


def _constraint(sampling: SamplingParams) -> dict[str, str]:
    """SGLang's scheduler compiles it; so what cannot be read, or costs too much, is refused here."""
    constraint = sampling.constraint
    if constraint is None:
        return {}
    check_alone(sampling)
    grammar_of(constraint)
    return {constraint.kind: constraint.text}


def _check_limits(sampling: SamplingParams, vocabulary: int, deterministic: bool) -> None:
    for refused in _refusals(sampling, vocabulary, deterministic):
        raise InvalidRequestError(refused)


def _refusals(sampling: SamplingParams, vocabulary: int, deterministic: bool) -> Iterator[str]:
    for token_id in sampling.logit_bias:
        if not 0 <= token_id < vocabulary:
            yield f"logit_bias: token id {token_id} is outside the vocabulary"
    if _is_greedy(sampling) and sampling.choices > 1:
        yield "n: with temperature 0 all answers would be the same; set a temperature, or leave n out"
    if sampling.seed is not None and not _is_greedy(sampling) and not deterministic:
        yield (
            "seed: this server's engine heeds it only with enable_deterministic_inference, which is off; "
            "leave it out"
        )
    if sampling.ignore_eos and sampling.stop_token_ids:
        yield "stop_token_ids: this server's engine ignores them with ignore_eos; leave one of the two out"
    if sampling.repetition_penalty > MOST_REPETITION_PENALTY:
        yield f"repetition_penalty must be at most {MOST_REPETITION_PENALTY:g} for this server's engine"
    if len(sampling.stop) > MOST_STOP_STRINGS:
        yield f"stop must have at most {MOST_STOP_STRINGS} strings for this server's engine"
    if sampling.logprobs is not None:
        for name in _changes_logits(sampling):
            yield (
                f"logprobs: this server's engine reports them after {name}, and not the model's own: leave "
                "one of the two out"
            )


def _changes_logits(sampling: SamplingParams) -> Iterator[str]:
    """Yield the options that SGLang applies before it notes log probabilities."""
    unlike_default = {
        "logit_bias": bool(sampling.logit_bias),
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_tokens": sampling.min_tokens > 0,
        "structured output": sampling.constraint is not None,
    }
    return (name for name, is_set in unlike_default.items() if is_set)
