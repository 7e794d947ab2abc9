"""The accounting of the cache: which entries there are, who holds them, in what order they were used.

Everything here runs under `Ledger.guard`. An operation begins with `begin`, so that what was released since
the last one counts as free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.entry import CachedEmbedding, EmbeddingMetadata, Entry, EntryState
from trtllm_mm_cache.cache.eviction.base import EvictionPolicy
from trtllm_mm_cache.cache.holds import Guard, Hold, HoldRegistry
from trtllm_mm_cache.cache.statistics import AgeCounter
from trtllm_mm_cache.errors import IntegrityError

if TYPE_CHECKING:
    from trtllm_mm_cache.cache.move import Move

_VISIBLE = EntryState.VISIBLE  # an enumeration's members are looked up slowly, and holding is a hot path

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counters:
    """What happened since the start."""

    hits: int = 0
    misses: int = 0
    hit_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    moves: int = 0
    moved_bytes: int = 0
    forgotten: int = 0


class Ledger:
    """Entries of one arena. `budget_bytes` bounds the sum of their sizes, `policy` orders `visible`.

    An entry is in one of `visible`, `pending` (reserved or quarantined) and `withdrawn` (invisible, still
    held); `leased` is the part of `visible` that has holders, and `idle_bytes` the size of the rest of it.
    With `retain` False an entry is withdrawn with its last holder.

    `movers` is held around a whole move, one at a time, and before `guard`; `moving` is the move under way.
    """

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy,
        *,
        budget_bytes: int,
        retain: bool,
        clock: Callable[[], float],
    ) -> None:
        self.guard = Guard()
        self.movers = Guard()
        self.moving: Move | None = None
        self.arena = arena
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.retain = retain
        self.visible: dict[str, Entry] = {}
        self.leased: set[Entry] = set()
        self.pending: set[Entry] = set()
        self.withdrawn: set[Entry] = set()
        self.at: dict[int, Entry] = {}  # by offset; entries of 0 bytes have none
        self.visible_bytes = 0
        self.idle_bytes = 0
        self.counters = Counters()
        self.eviction_ages = AgeCounter()
        self.holds = HoldRegistry()
        self._clock = clock
        self.closing = False

    @property
    def committed_bytes(self) -> int:
        """Bytes of the budget that are taken: by entries, and by what is being made room for."""
        used, move = self.arena.extents.used_bytes, self.moving
        if move is None:
            return used
        return used - sum(extent.nbytes for extent in move.extents) + move.nbytes

    def begin(self) -> None:
        """Account for what was released or garbage-collected. Raises `IntegrityError` after `close`."""
        if self.closing:
            raise IntegrityError("the cache is closed")
        self.settle_holds()

    def close(self) -> None:
        """Retain nothing from now on; the region goes with the last holder. Once, with holds settled."""
        self.closing = True
        self.retain = False
        for entry in list(self.visible.values()):
            self.withdraw(entry)
        self._close_when_empty()

    # -- holders ---------------------------------------------------------------------------------

    def hold(self, holder: Any, entry: Entry, *, by_reservation: bool = False) -> Hold:
        """Pin `entry` for as long as `holder` is alive and the hold is not released."""
        if entry.holders == 0 and entry.state is _VISIBLE:
            self.leased.add(entry)
            self.idle_bytes -= entry.extent.nbytes
        return self.holds.add(holder, entry, by_reservation=by_reservation)

    def release(self, hold: Hold) -> None:
        """End `hold`: at once, or, from a finalizer inside another operation, when the next one begins."""
        self.holds.release(hold)
        if not self.guard.owned:
            with self.guard:
                self.settle_holds()

    def end(self, hold: Hold) -> None:
        """End `hold` at once."""
        if self.holds.end(hold):
            self.after_hold(hold.entry)

    def settle_holds(self) -> None:
        """Account for everything that was released or garbage-collected since the last operation."""
        while (hold := self.holds.next_ended()) is not None:
            if hold.by_reservation:
                self._report_forgotten(hold.entry)
            self.after_hold(hold.entry)

    def _report_forgotten(self, entry: Entry) -> None:
        self.counters.forgotten += 1
        size, owner = entry.extent.nbytes, entry.owner
        if entry.state is EntryState.QUARANTINED:
            logger.error(
                "%d quarantined bytes of %s are lost: their reservation was dropped unsettled", size, owner
            )
            return
        logger.error("a reservation of %d bytes by %s was neither committed nor abandoned", size, owner)
        self.close_reservation(entry, "abandon")

    def after_hold(self, entry: Entry) -> None:
        """Do what is due when `entry` has no holder any more; nothing while it has one."""
        if entry.holders:
            return
        if entry.state is _VISIBLE:
            self.leased.discard(entry)
            self.idle_bytes += entry.extent.nbytes
            if not self.retain:
                self.withdraw(entry)
        elif entry.state is EntryState.WITHDRAWN:
            self._free(entry)

    # -- the life of an entry --------------------------------------------------------------------

    def open_reservation(
        self, key: str, nbytes: int, owner: str, tag: bytes | None = None, content: bytes | None = None
    ) -> Entry:
        """Allocate an extent, for which room has been made."""
        extent = self.arena.allocate(nbytes)
        if extent is None:
            raise IntegrityError(f"no hole of {nbytes} bytes although room was made")
        entry = Entry(key, extent, owner, tag, content)
        self.pending.add(entry)
        if nbytes:
            self.at[extent.offset] = entry
        return entry

    def close_reservation(self, entry: Entry, event: str) -> None:
        """End a reservation by `abandon` or `settle`; the extent is free with its last holder's end."""
        entry.advance(event)
        self.pending.discard(entry)
        self.withdrawn.add(entry)

    def publish(
        self, entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], metadata: EmbeddingMetadata
    ) -> bool:
        """Make a reserved entry visible; return whether it replaced another of the same key.

        The caller still holds it, and calls `end` or `after_hold` when it has put its lease in place.
        """
        entry.advance("commit")
        self.pending.discard(entry)
        entry.dtype, entry.shape, entry.metadata = dtype, shape, metadata
        entry.committed_at = self._clock()
        replaced = self.visible.get(entry.key)
        if replaced is not None:
            self.withdraw(replaced)
        self.visible[entry.key] = entry
        self.policy.admit(entry)
        self.leased.add(entry)
        self.visible_bytes += entry.extent.nbytes
        return replaced is not None

    def pass_on(
        self, entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], metadata: EmbeddingMetadata
    ) -> None:
        """Let a reserved entry be held and read without ever becoming visible."""
        entry.advance("pass")
        self.pending.discard(entry)
        self.withdrawn.add(entry)
        entry.dtype, entry.shape, entry.metadata = dtype, shape, metadata

    def look_up(self, key: str) -> Entry | None:
        """Count a hit or a miss; a hit is a use for the eviction policy."""
        entry = self.visible.get(key)
        if entry is None:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        self.counters.hit_bytes += entry.extent.nbytes
        self.policy.touch(entry)
        return entry

    def evict(self, entry: Entry) -> None:
        """Withdraw an entry to make room."""
        self.counters.evictions += 1
        self.counters.evicted_bytes += entry.extent.nbytes
        self.eviction_ages.add(self._clock() - entry.committed_at)
        self.withdraw(entry, evicted=True)

    def drop(self, entry: Entry) -> None:
        """Withdraw an entry because a caller wants it gone."""
        self.counters.dropped += 1
        self.counters.dropped_bytes += entry.extent.nbytes
        self.withdraw(entry)

    def withdraw(self, entry: Entry, *, evicted: bool = False) -> None:
        """Hide a visible entry; its bytes are free with its last holder's end."""
        entry.advance("withdraw")
        del self.visible[entry.key]
        self.policy.forget(entry, evicted=evicted)
        self.visible_bytes -= entry.extent.nbytes
        if entry.holders:
            self.leased.discard(entry)
            self.withdrawn.add(entry)
        else:
            self.idle_bytes -= entry.extent.nbytes
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        entry.advance("free")
        self.withdrawn.discard(entry)
        if entry.extent.nbytes:
            del self.at[entry.extent.offset]
        self.arena.free(entry.extent)
        self._close_when_empty()

    def _close_when_empty(self) -> None:
        if self.closing and not (self.visible or self.pending or self.withdrawn):
            self.arena.close()

    # -- what leaves the cache -------------------------------------------------------------------

    def hand_out(self, entry: Entry) -> CachedEmbedding:
        """Return the embedding as a tensor that pins the entry for as long as it has an alias."""
        grid = entry.metadata.grid_thw
        fields = entry.dynamo_fields or (None if grid is None else [list(grid)],)
        return CachedEmbedding(self.hand_out_tensor(entry), *fields)

    def hand_out_tensor(self, entry: Entry) -> torch.Tensor:
        """Return the embedding's tensor, which pins the entry for as long as it has an alias."""
        tensor = self._tensor(entry, entry.dtype)
        return tensor.view(*entry.shape) if entry.shape else tensor.view(())

    def hand_out_bytes(self, entry: Entry) -> torch.Tensor:
        """Return the extent as a uint8 tensor `[nbytes]` that pins the entry while it has an alias."""
        return self._tensor(entry, torch.uint8)

    def _tensor(self, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat tensor over the extent."""
        if not entry.extent.nbytes:
            return torch.empty(0, dtype=dtype)
        buffer = self.arena.buffer(entry.extent)
        self.hold(buffer, entry)
        return torch.frombuffer(buffer, dtype=dtype)
