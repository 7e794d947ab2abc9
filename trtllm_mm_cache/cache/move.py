"""A move: idle entries are copied to other extents, without the guard, so that a hole appears.

    begin    under the guard: places are allocated, the entries held
    copy     without it: look-ups find and lease the entries where they are
    end      under the guard: entries that no one else holds switch to their places, the others stay

At every moment between, each byte belongs to an entry or to the move, and `Ledger.committed_bytes` counts
what room is being made for, so that no other thread takes that part of the budget.
"""

from __future__ import annotations

from trtllm_mm_cache.cache.arena.extents import Extent, Relocation
from trtllm_mm_cache.cache.ledger import Ledger


class Move:
    """The entries of `relocation` on their way, to make a hole for `nbytes` bytes. Begins when constructed.

    It holds them, so that they are neither evicted nor moved by another. Made and ended under the guard,
    by the thread that has `Ledger.movers`.
    """

    __slots__ = ("__weakref__", "_claims", "_entries", "_holds", "_ledger", "_places", "nbytes")

    def __init__(self, ledger: Ledger, relocation: Relocation, nbytes: int) -> None:
        self.nbytes = nbytes
        self._ledger = ledger
        self._places = relocation.new
        self._claims = relocation.claims
        self._entries = [ledger.at[extent.offset] for extent in relocation.old]
        self._holds = [ledger.hold(self, entry) for entry in self._entries]
        ledger.moving = self

    @property
    def extents(self) -> tuple[Extent, ...]:
        """What is allocated for it and belongs to no entry."""
        return self._places + self._claims

    def copy(self) -> None:
        """Copy the bytes to their new places. Called without the guard. When it raises, nothing moves."""
        try:
            for entry, place in zip(self._entries, self._places, strict=True):
                self._ledger.arena.copy(entry.extent, place)
        except BaseException:
            with self._ledger.guard:
                self._end(copied=False)
            raise

    def end(self) -> bool:
        """Switch the entries that have no other holder; return whether all were switched.

        The places of the others are freed, and so is what the move had claimed.
        """
        return self._end(copied=True)

    def _end(self, *, copied: bool) -> bool:
        ledger, moved = self._ledger, 0
        ledger.settle_holds()
        ledger.moving = None
        for extent in self._claims:
            ledger.arena.free(extent)
        for entry, place in zip(self._entries, self._places, strict=True):
            vacated = place
            if copied and entry.holders == 1:
                vacated, entry.extent = entry.extent, place
                del ledger.at[vacated.offset]
                ledger.at[place.offset] = entry
                moved += 1
                ledger.counters.moved_bytes += place.nbytes
            ledger.arena.free(vacated)
        ledger.counters.moves += moved
        for hold in self._holds:
            ledger.end(hold)
        return moved == len(self._entries)
