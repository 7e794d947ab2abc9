"""Snapshots of the cache, for exporters and tests."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_mm_cache.cache.ages import AgeStatistics
from trtllm_mm_cache.cache.arena.extents import ExtentStatistics


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One queue of the eviction policy. Ghosts are keys of evicted entries: they count bytes, hold none."""

    name: str
    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A consistent snapshot. Sizes in bytes of tensors, without alignment padding.

    `entries`/`current_bytes` count what look-ups find, `leased_*` the part of it that somebody holds,
    `withdrawn_*` what nobody finds any more but somebody still holds. Hits, misses, evictions, drops,
    moves (of entries, to make a hole) and their bytes count since the start, as does `forgotten`:
    reservations that were garbage-collected open. `eviction_ages` tells how long evicted entries had
    been visible.
    `queues` are those of the eviction policy named `policy`.
    """

    entries: int
    current_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    hit_bytes: int
    evictions: int
    evicted_bytes: int
    dropped: int
    dropped_bytes: int
    moves: int
    moved_bytes: int
    leased_entries: int
    leased_bytes: int
    withdrawn_entries: int
    withdrawn_bytes: int
    reservations: int
    reserved_bytes: int
    quarantined: int
    quarantined_bytes: int
    forgotten: int
    eviction_ages: AgeStatistics
    policy: str
    queues: tuple[QueueStatistics, ...]
    arena: ExtentStatistics

    @property
    def utilization(self) -> float:
        """Share of the capacity that look-ups can find, 0 for a cache that retains nothing."""
        return self.current_bytes / self.capacity_bytes if self.capacity_bytes else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that were hits, 0 before the first look-up."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0
