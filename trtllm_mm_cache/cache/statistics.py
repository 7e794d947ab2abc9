"""Snapshots of the cache, for exporters and tests."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_mm_cache.cache.arena.extents import ExtentStatistics
from trtllm_mm_cache.cache.entry import Entry, EntryState

if TYPE_CHECKING:
    from trtllm_mm_cache.cache.ledger import Ledger

AGE_BOUNDS_S: tuple[float, ...] = (1, 10, 60, 300, 1800, 7200, 21600, 86400)
"""Upper bounds of the classes of ages in seconds, inclusive; the last class has none."""


@dataclass(frozen=True, slots=True)
class AgeStatistics:
    """A snapshot: how many ages fell into each class of `AGE_BOUNDS_S` and beyond, and their sum."""

    counts: tuple[int, ...]
    sum_seconds: float


class AgeCounter:
    """Counts ages. Not thread-safe."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(AGE_BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one age."""
        self._counts[bisect_left(AGE_BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def statistics(self) -> AgeStatistics:
        """Return a snapshot."""
        return AgeStatistics(tuple(self._counts), self._sum)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One queue of the eviction policy. Ghosts are keys of evicted entries: they count bytes, hold none."""

    name: str
    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A consistent snapshot. Sizes in bytes of tensors, without alignment padding.

    `entries`/`current_bytes` count what look-ups find, `leased_*` the part of it that has holders (a move
    under way is one), `withdrawn_*` what no look-up finds any more and still has holders. Hits, misses,
    evictions, drops, moves (of entries, to make a hole) and their bytes count since the start, as does
    `forgotten`: reservations that were garbage-collected open. `eviction_ages` tells how long evicted
    entries had been visible. `queues` are those of the eviction policy named `policy`.
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


def take_statistics(ledger: Ledger, capacity_bytes: int) -> CacheStatistics:
    """Return a snapshot. O(held entries)."""
    counters = ledger.counters
    quarantined = [entry for entry in ledger.pending if entry.state is EntryState.QUARANTINED]
    reserved = [entry for entry in ledger.pending if entry.state is EntryState.RESERVED]
    return CacheStatistics(
        entries=len(ledger.visible),
        current_bytes=ledger.visible_bytes,
        capacity_bytes=capacity_bytes,
        hits=counters.hits,
        misses=counters.misses,
        hit_bytes=counters.hit_bytes,
        evictions=counters.evictions,
        evicted_bytes=counters.evicted_bytes,
        dropped=counters.dropped,
        dropped_bytes=counters.dropped_bytes,
        moves=counters.moves,
        moved_bytes=counters.moved_bytes,
        leased_entries=len(ledger.leased),
        leased_bytes=sum_bytes(ledger.leased),
        withdrawn_entries=len(ledger.withdrawn),
        withdrawn_bytes=sum_bytes(ledger.withdrawn),
        reservations=len(reserved),
        reserved_bytes=sum_bytes(reserved),
        quarantined=len(quarantined),
        quarantined_bytes=sum_bytes(quarantined),
        forgotten=counters.forgotten,
        eviction_ages=ledger.eviction_ages.statistics(),
        policy=ledger.policy.name,
        queues=ledger.policy.queues(),
        arena=ledger.arena.statistics(),
    )


def sum_bytes(entries: Iterable[Entry]) -> int:
    """Return the size of all `entries` together."""
    return sum(entry.extent.nbytes for entry in entries)
