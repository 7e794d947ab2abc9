"""The books of the cache: which entries there are, in what order they were used, what may be evicted.

Everything here runs under `Ledger.guard`; `Lease`, `Reservation` and the manager are its only users.
An operation begins with `settle_holds`, so that what was let go since the last one counts as free.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch

from trtllm_mm_cache.cache.arena import Arena
from trtllm_mm_cache.cache.entry import CachedEmbedding, Details, Entry, EntryState
from trtllm_mm_cache.cache.extents import aligned
from trtllm_mm_cache.cache.guard import Guard
from trtllm_mm_cache.cache.holds import Hold, HoldRegistry
from trtllm_mm_cache.cache.statistics import CacheStatistics
from trtllm_mm_cache.errors import ArenaFullError, EntryTooLargeError, IntegrityError

logger = logging.getLogger(__name__)


class Ledger:
    """Entries of one arena. `budget_bytes` bounds the sum of all extents' sizes.

    With `retain` False an entry is withdrawn as soon as nobody holds it.
    """

    def __init__(self, arena: Arena, *, budget_bytes: int, retain: bool) -> None:
        self.guard = Guard()
        self.arena = arena
        self.retain = retain
        self.visible: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self.visible_bytes = 0
        self.hits = self.misses = self.evictions = 0
        self._budget = budget_bytes
        self._holds = HoldRegistry()
        self._pending: set[Entry] = set()
        self._withdrawn: set[Entry] = set()
        self._idle_bytes = 0  # visible and held by nobody: what eviction can free
        self._hit_bytes = self._evicted_bytes = self._forgotten = 0

    # -- holders ---------------------------------------------------------------------------------

    def hold(self, holder: Any, entry: Entry, *, by_reservation: bool = False) -> Hold:
        """Pin `entry` for as long as `holder` is alive and has not let go."""
        if entry.holders == 0 and entry.state is EntryState.VISIBLE:
            self._idle_bytes -= entry.extent.nbytes
        return self._holds.add(holder, entry, by_reservation=by_reservation)

    def let_go(self, hold: Hold) -> None:
        """End `hold`: at once, or, when another operation is under way, when the next one begins."""
        self._holds.let_go(hold)
        if not self.guard.mine:
            with self.guard:
                self.settle_holds()

    def end(self, hold: Hold) -> None:
        """End `hold` at once."""
        if self._holds.end(hold):
            self._unheld(hold.entry)

    def settle_holds(self) -> None:
        """Account for everything that was let go or garbage-collected since the last operation."""
        for hold in self._holds.drain():
            if hold.by_reservation:
                self._report_forgotten(hold.entry)
            self._unheld(hold.entry)

    def _report_forgotten(self, entry: Entry) -> None:
        self._forgotten += 1
        size, owner = entry.extent.nbytes, entry.owner
        if entry.state is EntryState.QUARANTINED:
            logger.error(
                "a quarantined reservation of %d bytes by %s was dropped: nobody can settle it", size, owner
            )
            return
        logger.error("a reservation of %d bytes by %s was neither committed nor abandoned", size, owner)
        self.close_reservation(entry, "abandon")

    def _unheld(self, entry: Entry) -> None:
        if entry.holders:
            return
        if entry.state is EntryState.VISIBLE:
            self._idle_bytes += entry.extent.nbytes
            if not self.retain:
                self.withdraw(entry)
        elif entry.state is EntryState.WITHDRAWN:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        entry.advance("free")
        self._withdrawn.discard(entry)
        self.arena.free(entry.extent)

    # -- entries ---------------------------------------------------------------------------------

    def look_up(self, key: str) -> Entry | None:
        """Count a hit or a miss; a hit becomes the most recently used entry."""
        entry = self.visible.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._hit_bytes += entry.extent.nbytes
        self.visible.move_to_end(key)
        return entry

    def publish(self, entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], details: Details) -> bool:
        """Make a reserved entry, which its reservation still holds, visible.

        Returns whether it replaced another of the same key.
        """
        entry.advance("commit")
        self._pending.discard(entry)
        entry.dtype, entry.shape, entry.details = dtype, shape, details
        replaced = self.visible.get(entry.key)
        if replaced is not None:
            self.withdraw(replaced)
        self.visible[entry.key] = entry
        self.visible_bytes += entry.extent.nbytes
        return replaced is not None

    def withdraw(self, entry: Entry) -> None:
        """Hide a visible entry; its bytes are free when nobody holds it."""
        entry.advance("withdraw")
        del self.visible[entry.key]
        self.visible_bytes -= entry.extent.nbytes
        if entry.holders:
            self._withdrawn.add(entry)
        else:
            self._idle_bytes -= entry.extent.nbytes
            self._free(entry)

    def close_reservation(self, entry: Entry, event: str) -> None:
        """End a reservation by `abandon` or `settle`; the extent is free when its holders have let go."""
        entry.advance(event)
        self._pending.discard(entry)
        self._withdrawn.add(entry)

    def hand_out(self, entry: Entry) -> CachedEmbedding:
        """Return the embedding as a tensor that pins the entry for as long as it has an alias."""
        tensor = self.hand_out_bytes(entry)
        return CachedEmbedding(tensor.view(entry.dtype).view(entry.shape), *entry.details)

    def hand_out_bytes(self, entry: Entry) -> torch.Tensor:
        """Return the extent as a uint8 tensor `[nbytes]` that pins the entry while it has an alias."""
        array = self.arena.array_view(entry.extent)
        self.hold(array, entry)
        return torch.from_numpy(array)

    # -- room ------------------------------------------------------------------------------------

    def fits(self, nbytes: int) -> bool:
        """Whether the bytes would suffice if everything that nobody holds were evicted."""
        return self.arena.extents.used_bytes - self._idle_bytes + nbytes <= self._budget

    def make_room(self, nbytes: int) -> list[str]:
        """Evict until an extent of `nbytes` can be allocated; return the evicted keys.

        Raises `EntryTooLargeError` and `ArenaFullError`, the latter without having evicted anything
        when the bytes could not suffice.
        """
        if nbytes > self._budget:
            raise EntryTooLargeError(
                f"an embedding of {nbytes} bytes is larger than the whole cache of {self._budget} bytes"
            )
        if not self.fits(nbytes):
            raise self._full(nbytes)
        evicted: list[str] = []
        while not self._has_room(nbytes):
            victim = next((entry for entry in self.visible.values() if entry.holders == 0), None)
            if victim is None:
                raise self._full(nbytes)
            self.withdraw(victim)
            self.evictions += 1
            self._evicted_bytes += victim.extent.nbytes
            evicted.append(victim.key)
        return evicted

    def reserve(self, key: str, nbytes: int, owner: str) -> Entry:
        """Allocate an extent for which `make_room` has made room."""
        extent = self.arena.allocate(nbytes)
        if extent is None:
            raise IntegrityError(f"no hole of {nbytes} bytes although room was made")
        entry = Entry(key, extent, owner)
        self._pending.add(entry)
        return entry

    def _has_room(self, nbytes: int) -> bool:
        extents = self.arena.extents
        return extents.used_bytes + nbytes <= self._budget and extents.largest_hole_bytes >= aligned(nbytes)

    def _full(self, nbytes: int) -> ArenaFullError:
        return ArenaFullError(
            f"no room for an embedding of {nbytes} bytes: too much of the cache is in use by running "
            "requests; retry, or raise the cache capacity"
        )

    # -- looking at it ---------------------------------------------------------------------------

    def statistics(self, capacity_bytes: int) -> CacheStatistics:
        """Return a snapshot."""
        leased = [entry for entry in self.visible.values() if entry.holders]
        quarantined = [entry for entry in self._pending if entry.state is EntryState.QUARANTINED]
        reserved = [entry for entry in self._pending if entry.state is EntryState.RESERVED]
        return CacheStatistics(
            entries=len(self.visible),
            current_bytes=self.visible_bytes,
            capacity_bytes=capacity_bytes,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            evicted_bytes=self._evicted_bytes,
            hit_bytes=self._hit_bytes,
            leased_entries=len(leased),
            leased_bytes=_sum_bytes(leased),
            withdrawn_entries=len(self._withdrawn),
            withdrawn_bytes=_sum_bytes(self._withdrawn),
            reservations=len(reserved),
            reserved_bytes=_sum_bytes(reserved),
            quarantined=len(quarantined),
            quarantined_bytes=_sum_bytes(quarantined),
            forgotten=self._forgotten,
            arena=self.arena.statistics(),
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every extent has one entry and every counter agrees. O(n)."""
        self.arena.check_integrity()
        counted = self._holds.counted()
        everything = [*self.visible.values(), *self._pending, *self._withdrawn]
        for entry in everything:
            if entry.holders != counted.get(id(entry), 0):
                raise IntegrityError(f"entry of {entry.owner} counts {entry.holders} holders")
            if (
                entry.extent.nbytes
                and self.arena.extents.extent_starting_at(entry.extent.offset) != entry.extent
            ):
                raise IntegrityError(f"an entry's extent at {entry.extent.offset} is not allocated")
        _require("visible entries are in state visible", all(
            entry.state is EntryState.VISIBLE and key == entry.key for key, entry in self.visible.items()
        ))  # fmt: skip
        _require("pending entries are reserved or quarantined", all(
            entry.state in (EntryState.RESERVED, EntryState.QUARANTINED) for entry in self._pending
        ))  # fmt: skip
        _require("withdrawn entries are held", all(
            entry.state is EntryState.WITHDRAWN and entry.holders for entry in self._withdrawn
        ))  # fmt: skip
        extents = self.arena.extents.statistics()
        _require("one entry for each extent", extents.extents == sum(e.extent.nbytes > 0 for e in everything))
        _require("used bytes", extents.used_bytes == _sum_bytes(everything) <= self._budget)
        _require("visible bytes", self.visible_bytes == _sum_bytes(self.visible.values()))
        _require("idle bytes", self._idle_bytes == _sum_bytes(
            entry for entry in self.visible.values() if not entry.holders
        ))  # fmt: skip


def _sum_bytes(entries: Any) -> int:
    return sum(entry.extent.nbytes for entry in entries)


def _require(what: str, holds: bool) -> None:
    if not holds:
        raise IntegrityError(f"the cache's books do not agree: {what}")
