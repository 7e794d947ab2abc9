"""Bounds on what one worker has under way: beyond them it refuses at once instead of queueing more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.errors import MmCacheError, OverloadedError
from trtllm_mm_cache.observability.metrics import counter, gauge

_GAUGES = {
    "image": ("waiting_image_bytes", "Bytes of images without an embedding yet."),
    "incoming": ("incoming_image_bytes", "Bytes of images whose keys are not known yet."),
}

_MOST_PROMPT_LOGPROBS = 8
"""Requests for their prompts' log probabilities at a time: each takes tens of MB in either process."""

_SMALL_SHARE = 1 / 256
_LARGE_SHARE = 3 / 4


class Admitted:
    """What is counted for one item; it belongs to the block that `Admission.admitted` was entered for."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.nbytes = 0

    def grow(self, nbytes: int) -> None:
        """Count `nbytes` more. Raises the refusal, with nothing counted, when they do not fit."""
        self._admission._check(self.nbytes, nbytes)
        self._count(nbytes)

    def shrink(self, nbytes: int) -> None:
        """Count `nbytes` less: they are not held any more."""
        self._count(-min(nbytes, self.nbytes))

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._admission.nbytes += nbytes


class Admission(Collector):
    """Admits at most `max_items` items of at most `max_bytes` bytes together. For use from one event loop.

    Who is refused gets the error that `refusal` makes; none waits. `what` is admitted: requests, images that
    wait for their embeddings, incoming ones, texts by their characters, or requests for log probabilities of
    their prompts. An item without bytes is never refused for its bytes. One of more than `max_bytes` can
    never fit and gets the error that `too_large` makes; where that is None, it is admitted while no other has
    bytes. With `room_for_small`, a quarter of the bytes is kept for items of less than 1/256 of them, so that
    large ones do not keep those out.

    `items` and `nbytes` are under way now, `refused` counts since the start.
    """

    def __init__(
        self,
        *,
        max_items: int,
        max_bytes: int,
        refusal: Callable[[], MmCacheError],
        what: Literal["request", "image", "incoming", "text", "prompt_logprobs"] = "image",
        too_large: Callable[[], MmCacheError] | None = None,
        room_for_small: bool = False,
    ) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._refusal = refusal
        self._what = what
        self._too_large = too_large
        self._room_for_small = room_for_small
        self.items = self.nbytes = self.refused = 0

    @classmethod
    def of_prompt_logprobs(cls) -> Admission:
        """Return what admits requests for log probabilities of their prompts."""
        refusal = f"{_MOST_PROMPT_LOGPROBS} requests for prompt_logprobs are under way; retry in a moment"
        return cls(
            what="prompt_logprobs",
            max_items=_MOST_PROMPT_LOGPROBS,
            max_bytes=sys.maxsize,
            refusal=lambda: OverloadedError(refusal),
        )

    @contextmanager
    def admitted(self, nbytes: int = 0) -> Iterator[Admitted]:
        """Count an item of `nbytes` bytes while the context lasts. Raises the refusal on entry."""
        if self.items >= self._max_items:
            self.refused += 1
            raise self._refusal()
        admitted = Admitted(self)
        admitted.grow(nbytes)
        self.items += 1
        try:
            yield admitted
        finally:
            self.items -= 1
            admitted.shrink(admitted.nbytes)

    def collect(self) -> Iterable[Metric]:
        """Yield what was refused, and the bytes that are under way."""
        if self._what in _GAUGES:
            yield gauge(*_GAUGES[self._what], self.nbytes)
        yield counter("refused", "Refused: too much under way.", self.refused, what=self._what)

    def _check(self, held: int, more: int) -> None:
        """Raise unless an item that has `held` bytes may have `more`."""
        item, others = held + more, self.nbytes - held
        if more == 0:
            return
        if self._too_large is not None and item > self._max_bytes:
            self.refused += 1
            raise self._too_large()
        small = not self._room_for_small or item < _SMALL_SHARE * self._max_bytes
        if others > 0 and others + item > self._max_bytes * (1 if small else _LARGE_SHARE):
            self.refused += 1
            raise self._refusal()
