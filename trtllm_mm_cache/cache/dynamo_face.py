"""The cache as Dynamo users know it: call for call its `MultimodalEmbeddingCacheManager` (Dynamo 1.6.1).

A tensor is copied in, and views are handed out. Entries are those of the other face (`manager.py`), with the
same look-ups, evictions and holders.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from trtllm_mm_cache.cache.entry import NO_METADATA, CachedEmbedding, CacheMutation, CacheReservation
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.room import Room
from trtllm_mm_cache.cache.statistics import CacheStatistics, take_statistics
from trtllm_mm_cache.errors import ArenaFullError

logger = logging.getLogger(__name__)


class DynamoFace:
    """What `MultimodalEmbeddingCacheManager` has of Dynamo's methods. Thread-safe."""

    def __init__(self, ledger: Ledger, capacity_bytes: int, name: str) -> None:
        self.name = name
        self._ledger = ledger
        self._capacity = capacity_bytes

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

        An entry under `key` is replaced, which is no eviction; then idle entries are evicted in the policy's
        order until it fits. Not stored are tensors larger than the capacity, and, unlike in Dynamo, tensors
        for which held entries leave no room: then nothing changes, unless other threads leased what was
        counted on while entries were moved; what was removed before is told. Blocks for the copy. Raises
        `AssertionError` for a tensor that is not contiguous, as Dynamo does.
        """
        ledger, tensor = self._ledger, entry.tensor.detach()
        nbytes = _tensor_bytes(tensor)
        if self._is_too_large(nbytes):
            return CacheMutation(False, [], [])
        room = Room(ledger, nbytes, instead_of=key)
        try:
            written = room.make(lambda: ledger.open_reservation(key, nbytes, "set"))
        except ArenaFullError as error:
            logger.warning("%s: not cached: %s", self.name, error.message)
            return CacheMutation(False, [], room.removed)
        try:
            ledger.arena.write(written.extent, tensor)
        except BaseException:
            with ledger.guard:
                ledger.close_reservation(written, "abandon")
                ledger.after_hold(written)
            raise
        with ledger.guard:
            written.dynamo_fields = tuple(entry[1:])
            replaced = ledger.publish(written, tensor.dtype, tuple(tensor.shape), NO_METADATA)
            ledger.after_hold(written)
        return CacheMutation(True, [] if room.replaced or replaced else [key], room.evicted)

    def make_room_for(self, key: str, size_bytes: int) -> CacheReservation:
        """Drop the entry under `key` and evict until an entry of `size_bytes` fits; reserve nothing.

        Not admitted are sizes above the capacity, and sizes for which held entries leave no room; what
        changes then is as in `set_with_delta`. When admitted, the dropped entry is neither an eviction nor
        among the removed keys.
        """
        if self._is_too_large(size_bytes):
            return CacheReservation(False, [])
        room = Room(self._ledger, size_bytes, instead_of=key)
        try:
            room.make(lambda: None)
        except ArenaFullError as error:
            logger.warning("%s: no room made: %s", self.name, error.message)
            return CacheReservation(False, room.removed)
        return CacheReservation(True, room.evicted)

    def _is_too_large(self, nbytes: int) -> bool:
        if nbytes > self._capacity:
            logger.warning("%s: not cached: %d bytes, more than the capacity", self.name, nbytes)
        return nbytes > self._capacity

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

    def statistics(self) -> CacheStatistics:
        """Return a consistent snapshot."""
        with self._ledger.guard:
            self._ledger.settle_holds()
            return take_statistics(self._ledger, self._capacity)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if not tensor.is_contiguous():
        raise AssertionError("Tensor must be contiguous")
    return tensor.element_size() * math.prod(tensor.shape)
