"""Bounds on what one worker has under way: beyond them it refuses at once instead of queueing more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trtllm_mm_cache.errors import MmCacheError


@dataclass(frozen=True)
class AdmissionStatistics:
    """A snapshot: `items` and `nbytes` are under way now, `refused` counts since start."""

    items: int
    nbytes: int
    refused: int


class Admission:
    """Admits at most `max_items` items of at most `max_bytes` bytes together. For use from one event loop.

    An item of more than `max_bytes` is admitted when it is the only one. Who is refused gets the error
    that `refusal` makes; nobody waits.
    """

    def __init__(self, *, max_items: int, max_bytes: int, refusal: Callable[[], MmCacheError]) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._refusal = refusal
        self._items = self._nbytes = self._refused = 0

    @contextmanager
    def admitted(self, nbytes: int = 0) -> Iterator[None]:
        """Count an item of `nbytes` bytes while the context lasts. Raises the refusal on entry."""
        full = self._items >= self._max_items
        if full or (self._items > 0 and self._nbytes + nbytes > self._max_bytes):
            self._refused += 1
            raise self._refusal()
        self._items += 1
        self._nbytes += nbytes
        try:
            yield
        finally:
            self._items -= 1
            self._nbytes -= nbytes

    def statistics(self) -> AdmissionStatistics:
        """Return a snapshot."""
        return AdmissionStatistics(self._items, self._nbytes, self._refused)
