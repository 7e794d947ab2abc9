"""Least recently used first: the default, and what Dynamo's cache does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.statistics import QueueStatistics
from trtllm_mm_cache.errors import IntegrityError


class LruPolicy:
    """One queue, oldest use first. See `base.EvictionPolicy`."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Entry, None] = OrderedDict()
        self._nbytes = 0
        # Bound once: this is the hot path of a hit.
        self.touch = self._order.move_to_end

    def admit(self, entry: Entry) -> None:
        """File as most recently used."""
        self._order[entry] = None
        self._nbytes += entry.extent.nbytes

    def forget(self, entry: Entry, *, evicted: bool) -> None:
        """Take it out; nothing is remembered."""
        del self._order[entry]
        self._nbytes -= entry.extent.nbytes

    def victim(self) -> Entry | None:
        """Return the least recently used idle entry."""
        for entry in self._order:
            if not entry.holders:
                return entry
        return None

    def resize(self, capacity_bytes: int) -> None:
        """Do nothing: the order is that of any size."""

    def entries(self) -> Iterator[Entry]:
        """Iterate, least recently used first."""
        return iter(self._order)

    def queues(self) -> tuple[QueueStatistics, ...]:
        """Describe the one queue."""
        return (QueueStatistics("lru", len(self._order), self._nbytes),)

    def check_integrity(self, visible: Mapping[str, Entry]) -> None:
        """Raise `IntegrityError` unless the queue holds `visible` and nothing else."""
        if self._order.keys() != set(visible.values()):
            raise IntegrityError(
                "inconsistent accounting of the cache: the LRU queue and the look-ups differ"
            )
        if self._nbytes != sum(entry.extent.nbytes for entry in self._order):
            raise IntegrityError("inconsistent accounting of the cache: bytes in the LRU queue")
