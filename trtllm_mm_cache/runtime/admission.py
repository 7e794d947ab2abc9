"""Bounds on what one worker has under way: beyond them it refuses at once instead of queueing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.observability.metrics import counter, gauge


class Admission(Collector):
    """Admits at most `max_items` items of at most `max_bytes` bytes together. For use from one event loop.

    An item of more than `max_bytes` is admitted when it is the only one. Who is refused gets the error
    that `refusal` makes; none waits. `what` is admitted: requests, images by
    their bytes, or texts by their characters.

    `items` and `nbytes` are under way now, `refused` counts since the start.
    """

    def __init__(
        self,
        *,
        max_items: int,
        max_bytes: int,
        refusal: Callable[[], MmCacheError],
        what: Literal["request", "image", "text"] = "image",
    ) -> None:
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._refusal = refusal
        self._what = what
        self.items = self.nbytes = self.refused = 0

    @contextmanager
    def admitted(self, nbytes: int = 0) -> Iterator[None]:
        """Count an item of `nbytes` bytes while the context lasts. Raises the refusal on entry."""
        full = self.items >= self._max_items
        if full or (self.items > 0 and self.nbytes + nbytes > self._max_bytes):
            self.refused += 1
            raise self._refusal()
        self.items += 1
        self.nbytes += nbytes
        try:
            yield
        finally:
            self.items -= 1
            self.nbytes -= nbytes

    def collect(self) -> Iterable[Metric]:
        """Yield what was refused, and for images the bytes that wait."""
        if self._what == "image":
            yield gauge("waiting_image_bytes", "Bytes of images without an embedding yet.", self.nbytes)
        yield counter("refused", "Refused: too much under way.", self.refused, what=self._what)
