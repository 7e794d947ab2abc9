"""Looking at the books: a snapshot of their numbers, and the proof that they agree."""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_mm_cache.cache.entry import Entry, EntryState
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.statistics import CacheStatistics
from trtllm_mm_cache.errors import IntegrityError

_PENDING_STATES = (EntryState.RESERVED, EntryState.QUARANTINED)


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
        leased_bytes=_sum_bytes(ledger.leased),
        withdrawn_entries=len(ledger.withdrawn),
        withdrawn_bytes=_sum_bytes(ledger.withdrawn),
        reservations=len(reserved),
        reserved_bytes=_sum_bytes(reserved),
        quarantined=len(quarantined),
        quarantined_bytes=_sum_bytes(quarantined),
        forgotten=counters.forgotten,
        eviction_ages=ledger.eviction_ages.statistics(),
        policy=ledger.policy.name,
        queues=ledger.policy.queues(),
        arena=ledger.arena.statistics(),
    )


def check_ledger(ledger: Ledger) -> None:
    """Raise `IntegrityError` unless extents are disjoint, each has one entry, and every counter agrees.

    O(n): for tests and for a look at a running worker, not for every operation.
    """
    ledger.arena.check_integrity()
    everything = [*ledger.visible.values(), *ledger.pending, *ledger.withdrawn]
    counted = ledger.holds.counted()
    for entry in everything:
        _check_entry(ledger, entry, counted.get(id(entry), 0))
    for key, entry in ledger.visible.items():
        _require(entry.key == key and entry.state is EntryState.VISIBLE, "a look-up finds a wrong entry")
    for entry in ledger.pending:
        _require(entry.state in _PENDING_STATES, f"a pending extent is {entry.state.value}")
    for entry in ledger.withdrawn:
        _require(entry.state is EntryState.WITHDRAWN and entry.holders > 0, "a withdrawn entry nobody holds")
    ledger.policy.check_integrity(ledger.visible)
    extents = ledger.arena.statistics()
    taken = [entry for entry in everything if entry.extent.nbytes]
    idle = [entry for entry in ledger.visible.values() if not entry.holders]
    held = {entry for entry in ledger.visible.values() if entry.holders}
    _require(extents.extents == len(taken) == len(ledger.at), "extents and entries are not one to one")
    _require(extents.used_bytes == _sum_bytes(everything), "used bytes")
    _require(extents.used_bytes <= ledger.budget_bytes, "the budget is exceeded")
    _require(ledger.visible_bytes == _sum_bytes(ledger.visible.values()), "visible bytes")
    _require(ledger.idle_bytes == _sum_bytes(idle), "idle bytes")
    _require(ledger.leased == held, "leased entries")


def _check_entry(ledger: Ledger, entry: Entry, holders: int) -> None:
    extent = entry.extent
    _require(
        entry.holders == holders, f"an entry of {entry.owner} counts {entry.holders} holders, not {holders}"
    )
    if extent.nbytes:
        _require(ledger.at.get(extent.offset) is entry, f"the entry at {extent.offset} is filed wrongly")
        allocated = ledger.arena.extents.extent_starting_at(extent.offset)
        _require(allocated == extent, f"the entry at {extent.offset} has no such extent")


def _sum_bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.extent.nbytes for entry in entries)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise IntegrityError(f"the books of the cache do not agree: {what}")
