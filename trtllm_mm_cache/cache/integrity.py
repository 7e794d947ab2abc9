"""The proof that the accounting is consistent: extents, entries, holders and counters."""

from __future__ import annotations

from trtllm_mm_cache.cache.entry import Entry, EntryState
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.statistics import sum_bytes
from trtllm_mm_cache.errors import IntegrityError

_PENDING_STATES = (EntryState.RESERVED, EntryState.QUARANTINED)


def check_ledger(ledger: Ledger) -> None:
    """Raise `IntegrityError` unless extents are disjoint, each is an entry's or a move's, and counters right.

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
        _require(
            entry.state is EntryState.WITHDRAWN and entry.holders > 0, "a withdrawn entry without a holder"
        )
    ledger.policy.check_integrity(ledger.visible)
    extents = ledger.arena.statistics()
    taken = [entry for entry in everything if entry.extent.nbytes]
    idle = [entry for entry in ledger.visible.values() if not entry.holders]
    held = {entry for entry in ledger.visible.values() if entry.holders}
    moving = ledger.moving.extents if ledger.moving else ()
    for extent in moving:
        _require(ledger.arena.extents.extent_starting_at(extent.offset) == extent, "a move's extent is free")
    _require(len(taken) == len(ledger.at) == extents.extents - len(moving), "extents without an entry")
    _require(
        extents.used_bytes == sum_bytes(everything) + sum(extent.nbytes for extent in moving), "used bytes"
    )
    _require(ledger.committed_bytes <= ledger.budget_bytes, "the budget is exceeded")
    _require(ledger.visible_bytes == sum_bytes(ledger.visible.values()), "visible bytes")
    _require(ledger.idle_bytes == sum_bytes(idle), "idle bytes")
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


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise IntegrityError(f"inconsistent accounting of the cache: {what}")
