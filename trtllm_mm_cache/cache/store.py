"""Copies a tensor into the arena under a key: what `set` and `set_with_delta` of the manager do."""

from __future__ import annotations

import logging
import math

import torch

from trtllm_mm_cache.cache.entry import CachedEmbedding, CacheMutation, EmbeddingMetadata
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.cache.room import make_room
from trtllm_mm_cache.errors import ArenaFullError

logger = logging.getLogger(__name__)


def store_copy(ledger: Ledger, key: str, entry: CachedEmbedding, *, capacity_bytes: int) -> CacheMutation:
    """Store a copy of `entry` and say which keys came and went; see the manager's `set_with_delta`.

    Room is made and the result published under the ledger's guard; the copy between the two is not.
    """
    tensor = entry.tensor.detach()
    nbytes = _tensor_bytes(tensor)
    if nbytes > capacity_bytes:
        logger.warning("embedding of %d bytes is larger than the cache of %d bytes", nbytes, capacity_bytes)
        return CacheMutation(False, [], [])
    with ledger.guard:
        ledger.begin()
        present = ledger.visible.get(key)
        try:
            removed = make_room(ledger, nbytes, instead_of=present)
        except ArenaFullError as error:
            logger.warning("embedding not cached: %s", error.message)
            return CacheMutation(False, [], [])
        written = ledger.open_reservation(key, nbytes, "set")
    try:
        ledger.arena.write(written.extent, tensor)
    except BaseException:
        with ledger.guard:
            ledger.close_reservation(written, "abandon")
            ledger.after_hold(written)
        raise
    with ledger.guard:
        written.dynamo_fields = tuple(entry[1:])
        replaced = ledger.publish(written, tensor.dtype, tuple(tensor.shape), EmbeddingMetadata())
        ledger.after_hold(written)
    return CacheMutation(True, [] if present or replaced else [key], removed)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if not tensor.is_contiguous():
        raise AssertionError("Tensor must be contiguous")
    return tensor.element_size() * math.prod(tensor.shape)
