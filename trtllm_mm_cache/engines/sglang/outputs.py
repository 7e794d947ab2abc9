"""SGLang's outputs as ours.

With `incremental_streaming_output` each output has what is new since the last: token ids, and for each of
them `(log probability, token id, None)` with the likeliest beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from trtllm_mm_cache.engines.base import FinishReason, PlaceLogprobs, TokenDelta, TokenLogprob
from trtllm_mm_cache.errors import GenerationError

LEAST_LOGPROB: Final = -9999.0
"""What stands for the logarithm of zero, as in OpenAI's API: JSON has no infinity."""

_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
}


def delta_of(output: Mapping[str, Any], choice: int, likeliest: int | None) -> TokenDelta | None:
    """Return what is new in an output of one choice; None for an output without anything new.

    Raises `GenerationError` for a choice that failed.
    """
    meta = output["meta_info"]
    reason = meta["finish_reason"]
    if reason is not None and reason.get("status_code") is not None:
        raise GenerationError("SGLang could not finish the answer; the PD worker's log may say why")
    tokens = tuple(output["output_ids"])
    if not tokens and reason is None:
        return None
    return TokenDelta(
        tokens,
        meta["prompt_tokens"],
        None if reason is None else _FINISH_REASONS[reason["type"]],
        () if likeliest is None else _places(tokens, meta, likeliest),
        choice=choice,
        cached_tokens=meta["cached_tokens"],
    )


def _places(tokens: Sequence[int], meta: Mapping[str, Any], likeliest: int) -> tuple[PlaceLogprobs, ...]:
    chosen = meta.get("output_token_logprobs") or ()
    best = meta.get("output_top_logprobs") or [()] * len(chosen)
    if [entry[1] for entry in chosen] != list(tokens) or len(best) != len(chosen):
        raise GenerationError("SGLang did not report the log probability of every token")
    return tuple(
        PlaceLogprobs(_logprob(one), tuple(_logprob(each) for each in (others or ())[:likeliest]))
        for one, others in zip(chosen, best, strict=True)
    )


def _logprob(reported: Sequence[Any]) -> TokenLogprob:
    return TokenLogprob(int(reported[1]), max(float(reported[0]), LEAST_LOGPROB))
