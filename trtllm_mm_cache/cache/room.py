"""Making room: what to evict and what to move so that an extent can be allocated.

1. The eviction policy's victims go until the bytes fit: the entries that a cache without fragmentation
   would evict, and no others.
2. If the bytes fit but no hole does, the entries between some holes are moved elsewhere. That copies at
   most as many bytes as the new entry has (or 1 MiB, which takes 0.1 ms).
3. If that is not possible, one more is evicted and 2 is tried again; when such evictions have freed as
   much as the new entry needs once more, entries in the way are evicted instead of moved.

The copy of 2 runs without the guard: look-ups, releases and drops go on, and so does making room without a
move. What is leased meanwhile stays where it is, and the room is looked for again. One thread moves at a
time; another that needs a move, or that is refused only because entries are being moved, waits for its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trtllm_mm_cache.cache.arena.extents import Extent, aligned
from trtllm_mm_cache.cache.arena.windows import Window, cheapest_windows
from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.move import Move
from trtllm_mm_cache.errors import ArenaFullError, EntryTooLargeError, IntegrityError

_FREE_MOVE_BYTES = 1024 * 1024
_FEW_EVICTIONS = 32

T = TypeVar("T")


class Room:
    """Room for one extent of `nbytes` bytes. For one use; takes the guard itself.

    The entry under `instead_of` is dropped first, which counts as no eviction; else only idle entries are
    touched. Afterwards, also after a refusal, `evicted` lists the evicted keys in order, and `replaced` tells
    whether `instead_of` was dropped.
    """

    __slots__ = ("_excess_bytes", "_instead_of", "_ledger", "_nbytes", "evicted", "replaced")

    def __init__(self, ledger: Ledger, nbytes: int, *, instead_of: str | None = None) -> None:
        self._ledger = ledger
        self._nbytes = nbytes
        self._instead_of = instead_of
        self._excess_bytes = 0
        self.evicted: list[str] = []
        self.replaced = False

    @property
    def removed(self) -> list[str]:
        """All keys that went, where no other entry takes the place of the dropped one."""
        dropped = [self._instead_of] if self.replaced and self._instead_of is not None else []
        return dropped + self.evicted

    def make(self, grant: Callable[[], T]) -> T:
        """Evict and move until the extent can be allocated; return what `grant` returns under the guard.

        Raises `EntryTooLargeError` or `ArenaFullError`: with nothing changed, unless other threads leased
        what this one counted on while it copied.
        """
        ledger = self._ledger
        with ledger.guard:
            ledger.begin()
            if self._make_without_moving():
                return grant()
        with ledger.movers:
            move: Move | None = None
            while True:
                with ledger.guard:
                    complete = move is None or move.end()
                    ledger.begin()
                    move = self._make_or_begin_move(may_move=complete)
                    if move is None:
                        return grant()
                move.copy()

    def make_at_once(self, grant: Callable[[], T]) -> T | None:
        """As `make`, but None where that would copy, wait for another thread's copy, or evict many.

        Microseconds, so also for the event loop. What was evicted by then `make` would have evicted too.
        """
        ledger = self._ledger
        with ledger.guard:
            ledger.begin()
            if ledger.moving is not None:
                return None
            _check_room(ledger, self._nbytes)
            for _ in range(_FEW_EVICTIONS):
                if ledger.committed_bytes + self._nbytes <= ledger.budget_bytes:
                    return grant() if self._has_hole() else None
                self._evict(self._victim())
            return None

    def _make_without_moving(self) -> bool:
        """Whether there is room now; False where a move is needed, or the end of another thread's."""
        try:
            self._evict_until_bytes_fit()
        except ArenaFullError:
            if self._ledger.moving is None:
                raise
            return False
        return self._has_hole()

    def _make_or_begin_move(self, *, may_move: bool) -> Move | None:
        """Return the move that makes the hole, or None once there is room."""
        ledger, nbytes = self._ledger, self._nbytes
        self._evict_until_bytes_fit()
        while not self._has_hole():
            if may_move and (move := _begin_move(ledger, nbytes)):
                return move
            may_move = True
            if self._excess_bytes >= nbytes and (window := _cheapest_window(ledger, nbytes)):
                entries = [ledger.at[extent.offset] for extent in window.extents]
            else:
                entries = [self._victim()]
            for entry in entries:
                self._excess_bytes += entry.extent.nbytes
                self._evict(entry)
        return None

    def _evict_until_bytes_fit(self) -> None:
        ledger = self._ledger
        _check_room(ledger, self._nbytes)
        if self._instead_of is not None and not self.replaced:
            present = ledger.visible.get(self._instead_of)
            if present is not None:
                ledger.withdraw(present)
                self.replaced = True
        while ledger.committed_bytes + self._nbytes > ledger.budget_bytes:
            self._evict(self._victim())

    def _has_hole(self) -> bool:
        return self._ledger.arena.extents.largest_hole_bytes >= aligned(self._nbytes)

    def _victim(self) -> Entry:
        entry = self._ledger.policy.victim()
        if entry is None:
            raise IntegrityError("nothing is left to evict although there was room to make")
        return entry

    def _evict(self, entry: Entry) -> None:
        self._ledger.evict(entry)
        self.evicted.append(entry.key)


def _check_room(ledger: Ledger, nbytes: int) -> None:
    """Raise unless the eviction of all idle entries would leave a hole of `nbytes` bytes."""
    if nbytes > ledger.budget_bytes:
        raise EntryTooLargeError(
            f"an embedding of {nbytes} bytes is larger than the whole cache of {ledger.budget_bytes} bytes: "
            "raise the cache capacity"
        )
    held_bytes = ledger.committed_bytes - ledger.idle_bytes
    if held_bytes + nbytes > ledger.budget_bytes or not _longest_run_takes(ledger, nbytes):
        raise ArenaFullError(
            f"no room for an embedding of {nbytes} bytes: {held_bytes} of {ledger.budget_bytes} bytes are "
            "in use by running requests; retry, or raise the cache capacity"
        )


def _longest_run_takes(ledger: Ledger, nbytes: int) -> bool:
    """Whether some run of bytes between two extents that must stay is long enough."""
    need, capacity = aligned(nbytes), ledger.arena.capacity_bytes
    moving = ledger.moving.extents if ledger.moving else ()
    fixed = len(ledger.leased) + len(ledger.pending) + len(ledger.withdrawn) + len(moving)
    unpinned = ledger.arena.extents.free_bytes + ledger.idle_bytes
    # However badly they lie, the longest run is at least as long as the average one.
    if unpinned >= need * (fixed + 1) or ledger.arena.extents.largest_hole_bytes >= need:
        return True
    held = [entry.extent for entry in (*ledger.leased, *ledger.pending, *ledger.withdrawn)]
    end = 0
    for extent in sorted((*held, *moving), key=lambda extent: extent.offset):
        if extent.offset - end >= need:
            return True
        end = max(end, extent.offset + aligned(extent.nbytes))
    return capacity - end >= need


def _begin_move(ledger: Ledger, nbytes: int) -> Move | None:
    """Begin the cheapest move that makes a hole of `nbytes` bytes; None, and no change, if none does."""
    extents = ledger.arena.extents
    if extents.free_bytes < aligned(nbytes):
        return None
    limit = max(nbytes, _FREE_MOVE_BYTES)
    for window in cheapest_windows(extents, nbytes, lambda extent: _is_idle(ledger, extent)):
        if window.nbytes > limit:
            return None
        relocation = extents.relocate(window.extents, window.start, window.end, nbytes)
        if relocation is not None:
            return Move(ledger, relocation, nbytes)
    return None


def _cheapest_window(ledger: Ledger, nbytes: int) -> Window | None:
    windows = cheapest_windows(ledger.arena.extents, nbytes, lambda extent: _is_idle(ledger, extent))
    return windows[0] if windows else None


def _is_idle(ledger: Ledger, extent: Extent) -> bool:
    entry = ledger.at[extent.offset]
    return not entry.holders and ledger.visible.get(entry.key) is entry
