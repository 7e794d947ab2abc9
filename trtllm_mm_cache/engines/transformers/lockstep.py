"""What the ranks tell each other while they compute one request, and how `generate` is kept in step.

Every rank runs the same `generate` call; the library's layers sum their parts over the ranks inside it.
Rank 0 alone chooses tokens and decides when the answer ends: after each forward pass it sends a
`Decision`, and the other ranks, whatever their own logits say, take that token and stop there. So sampling,
stop strings and cancellation exist on rank 0 only, and no rank can be left waiting in a sum.

Embeddings are never sent: a `Handle` says where in rank 0's arena one lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from trtllm_mm_cache.cache.arena.handle import Handle


@dataclass(frozen=True)
class Limits:
    """What ends an answer by itself, as `generate` takes it."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()

    def generation_config(self, **options: Any) -> GenerationConfig:
        """Return the configuration of one `generate` call."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.stop_token_ids) or None,
            pad_token_id=0,
            do_sample=False,
            **options,
        )


@dataclass(frozen=True)
class Work:
    """One request for the other ranks: `numbers` are the integer inputs of `generate` as nested lists."""

    numbers: Mapping[str, list[Any]]
    embeddings: tuple[Handle, ...]
    limits: Limits

    @classmethod
    def of(cls, inputs: Mapping[str, Any], embeddings: Sequence[Handle], limits: Limits) -> Work:
        """Describe a prepared request; of its inputs the embeddings are replaced by their handles."""
        numbers = {name: value.tolist() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return cls(numbers, tuple(embeddings), limits)


@dataclass(frozen=True)
class Decision:
    """Rank 0's choice: the newest token, and whether the answer ends with it."""

    token: int
    ended: bool


@dataclass(frozen=True)
class RankReport:
    """What another rank says when it has loaded the model, or is done with a request."""

    error: str | None = None


class AnnouncedEnd(StoppingCriteria):  # type: ignore[misc]
    """On rank 0: ask `criteria` whether the answer ends, and tell the others."""

    def __init__(self, criteria: Sequence[StoppingCriteria], announce: Callable[[Decision], None]) -> None:
        self._criteria = StoppingCriteriaList(criteria)
        self._announce = announce

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[batch]` of bool: True ends the answer."""
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            ended |= criterion(input_ids, scores, **kwargs)
        self._announce(Decision(int(input_ids[0, -1]), bool(ended.all())))
        return ended


class FollowedToken(LogitsProcessor):  # type: ignore[misc]
    """On another rank: wait for rank 0's choice and leave its token as the only possible one."""

    def __init__(self, receive: Callable[[], Decision]) -> None:
        self._receive = receive
        self.ended = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `[batch, vocabulary]`."""
        del input_ids
        decision = self._receive()
        self.ended = decision.ended
        chosen = torch.full_like(scores, -math.inf)
        chosen[:, decision.token] = 0.0
        return chosen


class FollowedEnd(StoppingCriteria):  # type: ignore[misc]
    """On another rank: end where rank 0 ended."""

    def __init__(self, followed: FollowedToken) -> None:
        self._followed = followed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[batch]` of bool: True ends the answer."""
        del scores, kwargs
        return torch.full((input_ids.shape[0],), self._followed.ended, device=input_ids.device)
