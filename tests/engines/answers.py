"""What an engine answered, put together from its deltas, and how far two answers are apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from trtllm_mm_cache.engines.base import PlaceLogprobs, PromptLogprobs, TokenDelta


@dataclass(frozen=True)
class Answer:
    """One choice, and what was said of the prompt with it."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[PlaceLogprobs, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def differs(self, other: Answer) -> float:
        """Return the largest difference of a log probability; infinite where tokens differ."""
        if self.tokens != other.tokens:
            return float("inf")
        assert len(self.logprobs) == len(other.logprobs) == len(self.tokens)
        largest = 0.0
        for one, another in zip(self.logprobs, other.logprobs, strict=True):
            mine, theirs = (
                {each.token_id: each.logprob for each in (*place.likeliest, place.chosen)}
                for place in (one, another)
            )
            shared = mine.keys() & theirs.keys()
            largest = max(largest, *(abs(mine[token] - theirs[token]) for token in shared))
        return largest


async def collect(deltas: AsyncIterator[TokenDelta], choices: int = 1) -> list[Answer]:
    """Return all choices of an answer, each of which must have ended, and once."""
    found = [Answer() for _ in range(choices)]
    async for delta in deltas:
        before = found[delta.choice]
        assert before.finish_reason is None, "a delta came after the last"
        found[delta.choice] = Answer(
            before.tokens + delta.token_ids,
            before.logprobs + delta.logprobs,
            delta.finish_reason,
            delta.prompt_tokens,
            delta.cached_tokens,
            before.prompt_logprobs or delta.prompt_logprobs,
        )
        assert before.prompt_logprobs is None or delta.prompt_logprobs is None, "they were said twice"
    assert all(answer.finish_reason is not None for answer in found)
    return found
