"""Making room: what to evict and what to move so that an extent can be allocated.

1. The eviction policy's victims go until the bytes fit: the entries that a cache without fragmentation
   would evict, and no others.
2. If the bytes fit but no hole does, the entries between some holes are moved elsewhere. That copies at
   most as many bytes as the new entry has (or 1 MiB, which takes 0.1 ms).
3. If that is not possible, one more is evicted and 2 is tried again; when such evictions have freed as
   much as the new entry needs once more, entries in the way are evicted instead of moved.
"""

from __future__ import annotations

from trtllm_mm_cache.cache.arena.extents import Extent, aligned
from trtllm_mm_cache.cache.arena.windows import cheapest_windows
from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.errors import ArenaFullError, EntryTooLargeError, IntegrityError

_FREE_MOVE_BYTES = 1024 * 1024


def make_room(ledger: Ledger, nbytes: int, *, instead_of: Entry | None = None) -> list[str]:
    """Evict and move until an extent of `nbytes` can be allocated; return the evicted keys in order.

    Drops `instead_of` first, which counts as no eviction. Apart from that only what nobody holds is
    touched. Raises `EntryTooLargeError` or `ArenaFullError` with nothing changed.
    """
    _check_room(ledger, nbytes)
    if instead_of is not None:
        ledger.withdraw(instead_of)
    evicted: list[str] = []
    extents = ledger.arena.extents
    while extents.used_bytes + nbytes > ledger.budget_bytes:
        evicted.append(_evict_one(ledger))
    before = ledger.counters.evicted_bytes
    while extents.largest_hole_bytes < aligned(nbytes):
        if _move_aside(ledger, nbytes):
            continue
        if ledger.counters.evicted_bytes - before >= nbytes and (keys := _evict_window(ledger, nbytes)):
            evicted += keys
            continue
        evicted.append(_evict_one(ledger))
    return evicted


def _check_room(ledger: Ledger, nbytes: int) -> None:
    """Raise unless everything that nobody holds, evicted, would leave a hole of `nbytes` bytes."""
    if nbytes > ledger.budget_bytes:
        raise EntryTooLargeError(
            f"an embedding of {nbytes} bytes is larger than the whole cache of {ledger.budget_bytes} bytes: "
            "raise the cache capacity"
        )
    extents = ledger.arena.extents
    held_bytes = extents.used_bytes - ledger.idle_bytes
    if held_bytes + nbytes > ledger.budget_bytes or not _longest_run_takes(ledger, nbytes):
        raise ArenaFullError(
            f"no room for an embedding of {nbytes} bytes: {held_bytes} of {ledger.budget_bytes} bytes are "
            "in use by running requests; retry, or raise the cache capacity"
        )


def _longest_run_takes(ledger: Ledger, nbytes: int) -> bool:
    """Whether some run of bytes between two extents that must stay is long enough."""
    need, capacity = aligned(nbytes), ledger.arena.capacity_bytes
    fixed = len(ledger.leased) + len(ledger.pending) + len(ledger.withdrawn)
    unpinned = ledger.arena.extents.free_bytes + ledger.idle_bytes
    # However badly they lie, the longest run is at least as long as the average one.
    if unpinned >= need * (fixed + 1) or ledger.arena.extents.largest_hole_bytes >= need:
        return True
    held = [
        entry.extent for entry in (*ledger.leased, *ledger.pending, *ledger.withdrawn) if entry.extent.nbytes
    ]
    end = 0
    for extent in sorted(held, key=lambda extent: extent.offset):
        if extent.offset - end >= need:
            return True
        end = extent.offset + aligned(extent.nbytes)
    return capacity - end >= need


def _evict_one(ledger: Ledger) -> str:
    entry = ledger.policy.victim()
    if entry is None:
        raise IntegrityError("nothing is left to evict although there was room to make")
    ledger.evict(entry)
    return entry.key


def _move_aside(ledger: Ledger, nbytes: int) -> bool:
    """Make a hole of `nbytes` bytes by moving entries; False, with nothing changed, where that fails."""
    extents = ledger.arena.extents
    if extents.free_bytes < aligned(nbytes):
        return False
    limit = max(nbytes, _FREE_MOVE_BYTES)
    for window in cheapest_windows(extents, nbytes, lambda extent: _is_idle(ledger, extent)):
        if window.nbytes > limit:
            return False
        places = extents.relocate(window.extents, window.start, window.end, nbytes)
        if places is not None:
            for old, new in zip(window.extents, places, strict=True):
                ledger.move(ledger.at[old.offset], new)
            ledger.counters.moves += len(places)
            ledger.counters.moved_bytes += window.nbytes
            return True
    return False


def _evict_window(ledger: Ledger, nbytes: int) -> list[str]:
    """Make a hole of `nbytes` bytes by evicting what is between some holes; none when all are blocked."""
    for window in cheapest_windows(ledger.arena.extents, nbytes, lambda extent: _is_idle(ledger, extent)):
        evicted = [ledger.at[extent.offset] for extent in window.extents]
        for entry in evicted:
            ledger.evict(entry)
        return [entry.key for entry in evicted]
    return []


def _is_idle(ledger: Ledger, extent: Extent) -> bool:
    entry = ledger.at[extent.offset]
    return not entry.holders and ledger.visible.get(entry.key) is entry
