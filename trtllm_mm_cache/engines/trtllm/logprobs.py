"""The engine's log probabilities as ours.

`CompletionOutput.logprobs` has one dictionary a token, from token id to a log probability, and grows with the
answer (read in `tensorrt_llm/executor/result.py`, 1.2 and 1.3). The engine reports the model's own
distribution unless told otherwise (`LogprobMode.RAW`, TensorRT-LLM #9675), as vLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_mm_cache.engines.base import PlaceLogprobs, TokenLogprob
from trtllm_mm_cache.errors import GenerationError


def places_of(
    tokens: Sequence[int], entries: Sequence[Mapping[int, Any]], likeliest: int
) -> tuple[PlaceLogprobs, ...]:
    """Return the log probabilities of `tokens`, with the `likeliest` at each place, best first.

    Raises `GenerationError` when the engine did not report every token.
    """
    if len(entries) < len(tokens) or not all(
        isinstance(entry, Mapping) and token in entry for token, entry in zip(tokens, entries, strict=False)
    ):
        raise GenerationError("TensorRT-LLM did not report the log probability of every token")
    return tuple(_place(token, entry, likeliest) for token, entry in zip(tokens, entries, strict=False))


def _place(token: int, entry: Mapping[int, Any], likeliest: int) -> PlaceLogprobs:
    found = {token_id: float(reported.logprob) for token_id, reported in entry.items()}
    best = sorted(found.items(), key=lambda pair: -pair[1])[:likeliest]
    return PlaceLogprobs(TokenLogprob(token, found[token]), tuple(TokenLogprob(*pair) for pair in best))
