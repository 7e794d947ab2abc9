"""What the ranks tell each other while they compute one request, and how `generate` is kept in step.

Every rank runs the same `generate` call; the library's layers sum their parts over the ranks inside it.
Rank 0 alone chooses tokens and decides when the answer ends: after each forward pass it sends a `Step`,
and the other ranks, whatever their own logits say, take that token and stop at that step. So sampling,
stop strings and cancellation exist on rank 0 only, and no rank can be left waiting in a sum.

Embeddings are never sent. A `SharedView` says where in rank 0's arena one lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from trtllm_mm_cache.cache.arena.region import open_shared_storage
from trtllm_mm_cache.cache.manager import Lease


@dataclass(frozen=True)
class SharedView:
    """One embedding in the arena: torch's handle of the arena's storage, and the place in it in bytes.

    True as long as the lease that it was made from is held.
    """

    manager: bytes
    file: bytes
    storage_bytes: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, lease: Lease) -> SharedView:
        """Describe a leased embedding; copies nothing."""
        tensor = lease.shared_tensor
        manager, file, nbytes = tensor.untyped_storage()._share_filename_cpu_()
        return cls(manager, file, nbytes, lease.offset, tensor.dtype, tuple(tensor.shape))


class SharedArenas:
    """Another rank's mappings of rank 0's arenas: each is opened at its first use and stays open."""

    def __init__(self) -> None:
        self._storages: dict[bytes, torch.UntypedStorage] = {}

    def tensor(self, view: SharedView) -> torch.Tensor:
        """Return the embedding, in the same physical memory as on rank 0."""
        storage = self._storages.get(view.file)
        if storage is None:
            storage = open_shared_storage(view.manager, view.file, view.storage_bytes)
            self._storages[view.file] = storage
        nbytes = math.prod(view.shape) * view.dtype.itemsize
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, view.offset, (nbytes,), (1,))
        return raw.view(view.dtype).view(view.shape)


@dataclass(frozen=True)
class Limits:
    """What ends an answer without anybody's decision, as `generate` takes it."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def generation_config(self, **options: Any) -> GenerationConfig:
        """Return the configuration of one `generate` call."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            eos_token_id=list(self.stop_token_ids) or None,
            pad_token_id=0,
            do_sample=False,
            **options,
        )


@dataclass(frozen=True)
class Work:
    """One request for the other ranks: `numbers` are the integer inputs of `generate` as nested lists."""

    numbers: Mapping[str, list[Any]]
    images: tuple[SharedView, ...]
    limits: Limits

    @classmethod
    def of(cls, inputs: Mapping[str, Any], images: Sequence[SharedView], limits: Limits) -> Work:
        """Describe a prepared request; of its inputs the images are replaced by their places."""
        numbers = {name: value.tolist() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return cls(numbers, tuple(images), limits)


@dataclass(frozen=True)
class Step:
    """Rank 0's choice: the newest token, and whether the answer ends with it."""

    token: int
    ended: bool


@dataclass(frozen=True)
class Report:
    """What another rank says when it has loaded the model, or is done with a request."""

    error: str | None = None


class AnnouncedEnd(StoppingCriteria):  # type: ignore[misc]
    """On rank 0: ask `criteria` whether the answer ends, and tell the others."""

    def __init__(self, criteria: Sequence[StoppingCriteria], announce: Callable[[Step], None]) -> None:
        self._criteria = StoppingCriteriaList(criteria)
        self._announce = announce

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[batch]` of bool: True ends the answer."""
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            ended |= criterion(input_ids, scores, **kwargs)
        self._announce(Step(int(input_ids[0, -1]), bool(ended.all())))
        return ended


class FollowedToken(LogitsProcessor):  # type: ignore[misc]
    """On another rank: wait for rank 0's choice and leave its token as the only possible one."""

    def __init__(self, receive: Callable[[], Step]) -> None:
        self._receive = receive
        self.ended = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `[batch, vocabulary]`."""
        del input_ids
        step = self._receive()
        self.ended = step.ended
        chosen = torch.full_like(scores, -math.inf)
        chosen[:, step.token] = 0.0
        return chosen


class FollowedEnd(StoppingCriteria):  # type: ignore[misc]
    """On another rank: end where rank 0 ended."""

    def __init__(self, followed: FollowedToken) -> None:
        self._followed = followed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[batch]` of bool: True ends the answer."""
        del scores, kwargs
        return torch.full((input_ids.shape[0],), self._followed.ended, device=input_ids.device)
