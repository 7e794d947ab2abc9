"""vLLM's outputs as ours.

Asked for deltas, vLLM yields for each choice what is new since its last output, with one dictionary of log
probabilities for each new token: the `logprobs` likeliest by rank, and the chosen one. The first output of a
request that asked for them has its prompt's, as lists (`flat_logprobs`, in `vllm/logprobs.py`, 0.32).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from trtllm_mm_cache.engines.base import (
    FinishReason,
    PlaceLogprobs,
    PromptLogprobs,
    TokenDelta,
    TokenLogprob,
)
from trtllm_mm_cache.errors import GenerationError

LEAST_LOGPROB: Final = -9999.0
"""What stands for the logarithm of zero, as in OpenAI's API: JSON has no infinity."""

_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
}


def deltas_of(
    output: Any, likeliest: int | None, prompt_logprobs: PromptLogprobs | None = None
) -> Iterator[TokenDelta]:
    """Yield what is new in a `RequestOutput`, the first delta with `prompt_logprobs`.

    Raises `GenerationError` for a choice that failed.
    """
    prompt_tokens = len(output.prompt_token_ids or ())
    for completion in output.outputs:
        reason = completion.finish_reason
        if reason is not None and reason not in _FINISH_REASONS:
            raise GenerationError(
                "vLLM could not finish the answer, for example because an embedding could not be loaded; the "
                "PD worker's log may say why"
            )
        tokens = tuple(completion.token_ids)
        if tokens or reason is not None:
            yield TokenDelta(
                tokens,
                prompt_tokens,
                None if reason is None else _FINISH_REASONS[reason],
                () if likeliest is None else _places(tokens, completion.logprobs or (), likeliest),
                choice=completion.index,
                cached_tokens=output.num_cached_tokens,
                prompt_logprobs=prompt_logprobs,
            )
            prompt_logprobs = None


def prompt_logprobs_of(output: Any, likeliest: int) -> PromptLogprobs | None:
    """Return what a `RequestOutput` says of the prompt's tokens; None where that has been said.

    Raises `GenerationError` unless every token has as many as were asked for.
    """
    reported = output.prompt_logprobs
    if not reported:
        return None
    width = likeliest + 1
    if len(reported.token_ids) != width * (len(output.prompt_token_ids) - 1):
        raise GenerationError("vLLM did not report the log probability of every token of the prompt")
    logprobs = [max(each, LEAST_LOGPROB) for each in reported.logprobs]
    return PromptLogprobs(width, reported.token_ids, logprobs, reported.ranks)


def ended_by_stop_string(output: Any) -> bool:
    """Whether this process, which finds stop strings, ended an answer that EngineCore may still compute."""
    return any(isinstance(completion.stop_reason, str) for completion in output.outputs)


def _places(
    tokens: Sequence[int], entries: Sequence[Mapping[int, Any]], likeliest: int
) -> tuple[PlaceLogprobs, ...]:
    if len(entries) != len(tokens):
        raise GenerationError("vLLM did not report the log probability of every token")
    return tuple(_place(token, entry, likeliest) for token, entry in zip(tokens, entries, strict=True))


def _place(token: int, entry: Mapping[int, Any], likeliest: int) -> PlaceLogprobs:
    if token not in entry:
        raise GenerationError("vLLM did not report the log probability of every token")
    best = sorted(entry.items(), key=lambda pair: pair[1].rank)[:likeliest]
    return PlaceLogprobs(_logprob(token, entry[token]), tuple(_logprob(*pair) for pair in best))


def _logprob(token_id: int, reported: Any) -> TokenLogprob:
    return TokenLogprob(token_id, max(float(reported.logprob), LEAST_LOGPROB))
