"""The cache manager: embeddings by key, in one arena, evicted by a policy (least recently used first).

Two faces on the same entries. The one that Dynamo users know (`get`, `set`, `set_with_delta`,
`make_room_for`, `keys`, `stats`) copies a tensor in and gives views out. The other writes in place:
`reserve` an extent, let NIXL READ into it, `commit` once it is checked, and hold a `Lease` while in use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from trtllm_mm_cache.cache.arena.arena import ALIGNMENT, Arena
from trtllm_mm_cache.cache.audit import check_ledger, take_statistics
from trtllm_mm_cache.cache.entry import (
    CachedEmbedding,
    CacheMutation,
    CacheReservation,
    EntryState,
)
from trtllm_mm_cache.cache.eviction.base import EvictionPolicy
from trtllm_mm_cache.cache.eviction.lru import LruPolicy
from trtllm_mm_cache.cache.lease import Lease
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.reservation import Reservation
from trtllm_mm_cache.cache.room import make_room
from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.cache.statistics import CacheStatistics
from trtllm_mm_cache.cache.store import store_copy
from trtllm_mm_cache.errors import ArenaFullError

logger = logging.getLogger(__name__)

__all__ = [
    "CacheMutation",
    "CacheReservation",
    "CacheStatistics",
    "CachedEmbedding",
    "EntryState",
    "Lease",
    "MultimodalEmbeddingCacheManager",
    "Reservation",
]

# Below this capacity alignment would be felt: a cache of a few hundred bytes must hold as many tensors as
# their sizes say. Such a region gets room for the padding of 1,024 entries. A larger one gets exactly its
# capacity; there 64 bytes an entry do not matter and the budget is a ceiling.
_SMALL_CAPACITY_BYTES = 1024 * 1024
_SMALL_PADDING_BYTES = 1024 * ALIGNMENT


class MultimodalEmbeddingCacheManager:
    """A byte-bounded cache of embeddings in shared memory. Thread-safe, never blocks on room.

    `capacity_bytes` bounds the sum of the tensors' bytes, held, reserved and quarantined ones included;
    all of it is committed when the constructor returns. With `capacity_bytes` 0 nothing is retained:
    `set` refuses, and an entry that came in by `reserve` and `commit` goes when nobody holds it;
    `transfer_bytes` is the size of the arena for that and means nothing otherwise. `policy` says what is
    evicted: least recently used entries first, or another from `policy.make_policy`, for this cache alone.
    `clock` counts seconds; it only tells how old entries were when they were evicted.

    What somebody holds (a lease, a reservation, a tensor or anything derived from it without a copy)
    is neither evicted nor rewritten; eviction passes over it. Raises `SharedMemoryError`.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        transfer_bytes: int = 0,
        name: str = "cache",
        prefault: bool = True,
        policy: EvictionPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity_bytes
        self.name = name
        budget = capacity_bytes if capacity_bytes > 0 else transfer_bytes
        padding = _SMALL_PADDING_BYTES if budget < _SMALL_CAPACITY_BYTES else 0
        # Without a transfer arena, capacity 0 is Dynamo's: it retains, but only tensors of 0 bytes.
        retain = capacity_bytes > 0 or transfer_bytes <= 0
        arena = Arena(budget + padding, prefault=prefault)
        self._ledger = Ledger(arena, policy or LruPolicy(), budget_bytes=budget, retain=retain, clock=clock)
        logger.info("embedding cache: capacity %d bytes, arena %d bytes", capacity_bytes, budget + padding)

    @property
    def arena(self) -> Arena:
        """The region that all entries lie in: register `base_address` and `capacity_bytes` once."""
        return self._ledger.arena

    @property
    def capacity_bytes(self) -> int:
        """The configured capacity; 0 where nothing is retained."""
        return self._capacity

    @property
    def retain(self) -> bool:
        """Whether entries stay when nobody holds them."""
        return self._ledger.retain

    # -- in place --------------------------------------------------------------------------------

    def lease(self, key: str) -> Lease | None:
        """Return a lease on the entry, or None. Counts a hit or a miss; a hit is a use of the entry."""
        ledger = self._ledger
        with ledger.guard:
            ledger.begin()
            entry = ledger.look_up(key)
            return None if entry is None else Lease(ledger, entry)

    def peek(self, key: str) -> bool:
        """Whether a look-up would hit. Counts nothing and changes no order."""
        with self._ledger.guard:
            self._ledger.begin()
            return key in self._ledger.visible

    def __contains__(self, key: str) -> bool:
        return self.peek(key)

    def reserve(self, key: str, nbytes: int, *, owner: str, tag: bytes | None = None) -> Reservation:
        """Return room for an entry of `nbytes` bytes, evicting what nobody holds; `owner` is for the log.

        `tag` marks the entry as one of those that `drop_selected` can drop together.

        An entry under the same key stays visible until the commit. Does not wait for room, but may copy
        up to `nbytes` bytes (1 MiB at least) of other entries to make a hole. Raises at once
        `EntryTooLargeError` when the cache is smaller than that, `ArenaFullError` when what is held
        leaves no room.
        """
        ledger = self._ledger
        with ledger.guard:
            ledger.begin()
            make_room(ledger, nbytes)
            return Reservation(ledger, ledger.open_reservation(key, nbytes, owner, tag))

    def drop(self, key: str) -> bool:
        """Make the entry invisible; holders keep it. False when there was none. Counts no eviction."""
        with self._ledger.guard:
            self._ledger.begin()
            entry = self._ledger.visible.get(key)
            if entry is None:
                return False
            self._ledger.drop(entry)
            return True

    def drop_selected(self, selection: Selection) -> Dropped:
        """Make what `selection` selects invisible; holders keep it. O(entries) unless it is one key."""
        with self._ledger.guard:
            self._ledger.begin()
            visible = self._ledger.visible
            candidates = visible.values() if selection.key is None else [visible.get(selection.key)]
            entries = [entry for entry in candidates if entry and selection.matches(entry.key, entry.tag)]
            nbytes = sum(entry.extent.nbytes for entry in entries)
            for entry in entries:
                self._ledger.drop(entry)
            return Dropped(tuple(entry.key for entry in entries), nbytes)

    def clear(self) -> int:
        """Drop every entry and return how many there were."""
        return self.drop_selected(Selection()).entries

    # -- as in Dynamo ----------------------------------------------------------------------------

    def get(self, key: str) -> CachedEmbedding | None:
        """Return the embedding, or None. Counts a hit or a miss; a hit is a use of the entry.

        The tensor is a view into the arena that pins the entry while it has an alias. Do not write to it.
        """
        ledger = self._ledger
        with ledger.guard:
            ledger.begin()
            entry = ledger.look_up(key)
            return None if entry is None else ledger.hand_out(entry)

    def set(self, key: str, entry: CachedEmbedding) -> bool:
        """Store a copy of `entry` under `key`; see `set_with_delta`. Returns whether it is stored."""
        return self.set_with_delta(key, entry).stored

    def set_with_delta(self, key: str, entry: CachedEmbedding) -> CacheMutation:
        """Store a copy of `entry` and say which keys came and went.

        An entry under `key` is replaced, which is no eviction; then entries that nobody holds are evicted
        in the policy's order until it fits. Not stored are tensors larger than the capacity, and, unlike
        in Dynamo, tensors for which held entries leave no room: then nothing changes. Blocks for the
        copy. Raises `AssertionError` for a tensor that is not contiguous, as Dynamo does.
        """
        return store_copy(self._ledger, key, entry, capacity_bytes=self._capacity)

    def make_room_for(self, key: str, size_bytes: int) -> CacheReservation:
        """Drop the entry under `key` and evict until an entry of `size_bytes` fits; reserve nothing.

        Not admitted, with nothing changed: sizes above the capacity, and sizes for which held entries
        leave no room. The dropped entry is neither an eviction nor among the removed keys.
        """
        if size_bytes > self._capacity:
            logger.warning(
                "embedding of %d bytes is larger than the cache of %d bytes", size_bytes, self._capacity
            )
            return CacheReservation(False, [])
        with self._ledger.guard:
            self._ledger.begin()
            try:
                present = self._ledger.visible.get(key)
                return CacheReservation(True, make_room(self._ledger, size_bytes, instead_of=present))
            except ArenaFullError as error:
                logger.warning("no room made: %s", error.message)
                return CacheReservation(False, [])

    def keys(self) -> list[str]:
        """Return the keys in the order of eviction, were none used any more: least recently used first."""
        with self._ledger.guard:
            self._ledger.begin()
            return [entry.key for entry in self._ledger.policy.entries()]

    @property
    def stats(self) -> dict[str, Any]:
        """Entries, bytes, utilization, hits, misses, evictions and hit rate, named as in Dynamo."""
        snapshot = self.statistics()
        return {
            "entries": snapshot.entries,
            "current_bytes": snapshot.current_bytes,
            "capacity_bytes": snapshot.capacity_bytes,
            "utilization": snapshot.utilization,
            "hits": snapshot.hits,
            "misses": snapshot.misses,
            "evictions": snapshot.evictions,
            "hit_rate": snapshot.hit_rate,
        }

    # -- looking at it ---------------------------------------------------------------------------

    def statistics(self) -> CacheStatistics:
        """Return a consistent snapshot."""
        with self._ledger.guard:
            self._ledger.settle_holds()
            return take_statistics(self._ledger, self._capacity)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless extents are disjoint, all bytes accounted for and counters right."""
        with self._ledger.guard:
            self._ledger.settle_holds()
            check_ledger(self._ledger)

    def close(self) -> None:
        """Drop every entry and give the arena back, once its last holder lets go. Idempotent.

        Tensors handed out stay true, leases and reservations can still be ended. Look-ups and new
        entries raise `IntegrityError` from now on.
        """
        with self._ledger.guard:
            self._ledger.close()
