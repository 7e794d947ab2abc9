"""The cache manager: embeddings by key, in one arena, evicted by a policy (least recently used first).

Two faces on the same entries. This one writes in place: `reserve` an extent, let NIXL READ into it, `commit`
once it is checked, and hold a `Lease` while in use. The one that Dynamo users know is `dynamo_face.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trtllm_mm_cache.cache.arena.arena import ALIGNMENT, Arena
from trtllm_mm_cache.cache.dynamo_face import DynamoFace
from trtllm_mm_cache.cache.entry import (
    CachedEmbedding,
    CacheMutation,
    CacheReservation,
    EmbeddingMetadata,
    EntryState,
)
from trtllm_mm_cache.cache.eviction.base import EvictionPolicy
from trtllm_mm_cache.cache.eviction.lru import LruPolicy
from trtllm_mm_cache.cache.integrity import check_ledger
from trtllm_mm_cache.cache.lease import Lease
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.reservation import Reservation
from trtllm_mm_cache.cache.room import Room
from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.cache.statistics import CacheStatistics, take_statistics
from trtllm_mm_cache.errors import IntegrityError

logger = logging.getLogger(__name__)

__all__ = [
    "CacheMutation",
    "CacheReservation",
    "CacheStatistics",
    "CachedEmbedding",
    "EmbeddingMetadata",
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


class MultimodalEmbeddingCacheManager(DynamoFace):
    """A byte-bounded cache of embeddings in shared memory. Thread-safe; no look-up waits while room is made.

    `capacity_bytes` bounds the sum of the tensors' bytes, held, reserved and quarantined ones included;
    all of it is committed when the constructor returns. With `capacity_bytes` 0 nothing is retained:
    `set` refuses, and an entry that came in by `reserve` and `commit` goes with its last holder;
    `transfer_bytes` is the size of the arena for that and means nothing otherwise. `policy` says what is
    evicted: least recently used entries first, or another from `make_policy`, for this cache alone.
    `name` stands for it in the log; `clock` counts seconds, and only tells how old entries were when they
    were evicted.

    What has a holder (a lease, a reservation, a tensor or anything derived from it without a copy) is
    neither evicted nor rewritten; eviction passes over it. Raises `SharedMemoryError`.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        name: str = "cache",
        transfer_bytes: int = 0,
        prefault: bool = True,
        policy: EvictionPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        budget = capacity_bytes if capacity_bytes > 0 else transfer_bytes
        padding = _SMALL_PADDING_BYTES if budget < _SMALL_CAPACITY_BYTES else 0
        # Without a transfer arena, capacity 0 is Dynamo's: it retains, but only tensors of 0 bytes.
        retain = capacity_bytes > 0 or transfer_bytes <= 0
        arena = Arena(budget + padding, prefault=prefault)
        ledger = Ledger(arena, policy or LruPolicy(), budget_bytes=budget, retain=retain, clock=clock)
        super().__init__(ledger, capacity_bytes, name)
        logger.info("%s: capacity %d bytes, arena %d bytes", name, capacity_bytes, budget + padding)

    @property
    def arena(self) -> Arena:
        """The region that all entries lie in: register `base_address` and `capacity_bytes` once."""
        return self._ledger.arena

    @property
    def budget_bytes(self) -> int:
        """Most bytes of all tensors together: the capacity, or the transfer bytes with capacity 0."""
        return self._ledger.budget_bytes

    @property
    def capacity_bytes(self) -> int:
        """The configured capacity; 0 where nothing is retained."""
        return self._capacity

    @property
    def retain(self) -> bool:
        """Whether entries stay without a holder."""
        return self._ledger.retain

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

    def reserve(
        self,
        key: str,
        nbytes: int,
        *,
        owner: str,
        tag: bytes | None = None,
        content: bytes | None = None,
    ) -> Reservation:
        """Return room for an entry of `nbytes` bytes, evicting idle entries; `owner` is for the log.

        `tag` and `content` mark the entry as one of those that `drop_selected` can drop together.

        An entry under the same key stays visible until the commit. Does not wait for holders, but may copy
        up to `nbytes` bytes (1 MiB at least) of other entries to make a hole, or wait for another thread
        that does: call it off the event loop. Raises at once `EntryTooLargeError` when the cache is smaller
        than that, `ArenaFullError` when what is held leaves no room.
        """
        ledger = self._ledger
        return Room(ledger, nbytes).make(
            lambda: Reservation(ledger, ledger.open_reservation(key, nbytes, owner, tag, content))
        )

    def reserve_at_once(
        self,
        key: str,
        nbytes: int,
        *,
        owner: str,
        tag: bytes | None = None,
        content: bytes | None = None,
    ) -> Reservation | None:
        """As `reserve`, in microseconds; None where that would copy, wait or evict many: then `reserve`."""
        ledger = self._ledger
        return Room(ledger, nbytes).make_at_once(
            lambda: Reservation(ledger, ledger.open_reservation(key, nbytes, owner, tag, content))
        )

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
            entries = [
                entry
                for entry in candidates
                if entry and selection.matches(entry.key, entry.tag, entry.content)
            ]
            nbytes = sum(entry.extent.nbytes for entry in entries)
            for entry in entries:
                self._ledger.drop(entry)
            return Dropped(tuple(entry.key for entry in entries), nbytes)

    def clear(self) -> int:
        """Drop every entry and return how many there were."""
        return self.drop_selected(Selection()).entries

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless extents are disjoint, all bytes accounted for and counters right."""
        with self._ledger.guard:
            self._ledger.settle_holds()
            check_ledger(self._ledger)

    def close(self) -> None:
        """Drop every entry and release the arena, once its last holder has ended. Idempotent.

        Checks the accounting and logs what is still held: a worker that has drained holds nothing but the
        extents of READs that have not settled. Tensors handed out stay valid, leases and reservations can
        still be ended. Look-ups and new entries raise `IntegrityError` from now on.
        """
        ledger = self._ledger
        with ledger.guard:
            if ledger.closing:
                return
            ledger.settle_holds()
            try:
                check_ledger(ledger)
            except IntegrityError:
                logger.exception("%s: closed, accounting inconsistent", self.name)
            else:
                held = take_statistics(ledger, self._capacity)
                logger.info(
                    "%s: closed, accounting consistent; bytes held: leased %d, reserved %d, quarantined %d",
                    self.name,
                    held.leased_bytes + held.withdrawn_bytes,
                    held.reserved_bytes,
                    held.quarantined_bytes,
                )
            for entry in ledger.pending:
                logger.warning(
                    "%s: closed while %d bytes are %s by %s",
                    self.name,
                    entry.extent.nbytes,
                    entry.state.value,
                    entry.owner,
                )
            ledger.close()
