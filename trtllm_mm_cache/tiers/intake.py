"""Steps 6 and 7 for one missing embedding: what a tier has ready is read and committed.

    6 fill         the tier writes straight into a reserved extent
    7 commit       only after checksum, size, shape, dtype, rows and values agree

What was found and will not be read is released at once, so that it does not stay leased where it lies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import torch
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import Lease, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import EmbeddingMismatchError, MmCacheError
from trtllm_mm_cache.observability.metrics import Step
from trtllm_mm_cache.tiers.base import Found, MissingItem

CheckEmbedding = Callable[[ItemDescription, tuple[int, int], torch.dtype, EmbeddingMetadata], None]
"""`Generator.check_embedding`: raises `EmbeddingMismatchError` for what cannot be the item's embedding."""

MakeRoom = Callable[[MissingItem, int], Awaitable[Reservation]]
"""Reserves so many bytes for an item."""


class Intake:
    """How embeddings enter one PD worker's memory. For use from one event loop.

    `what_if` is told what enters the cache.
    """

    def __init__(self, check: CheckEmbedding, what_if: WhatIf | None, registry: CollectorRegistry) -> None:
        self._check = check
        self._what_if = what_if
        self.reserve_step = Step.new(registry, "reserve", "Before step 6: making room in the arena.")
        self._transfer_step = Step.new(
            registry, "transfer", "Step 6: NIXL READ, or read from a tier, and checks."
        )
        self.commit_step = Step.new(registry, "commit", "Step 7: checks until the entry is visible.")

    async def take(self, item: MissingItem, found: Found, make_room: MakeRoom) -> Lease:
        """Return a lease on what a tier has `found`; see `tiers.base.Receive`."""
        try:
            dtype = announced_dtype(found)
            item.needs[item.key.hex] = found.nbytes
            self._check(item.description, found.shape, dtype, found.metadata)
            with self.reserve_step.time():
                reservation = await make_room(item, found.nbytes)
        except BaseException:
            found.release()
            raise
        with self._transfer_step.time():
            await found.read_into(reservation, finite=True)
        with self.commit_step.time():
            try:
                return self.commit(item, reservation, dtype, found.shape, found.metadata)
            except MmCacheError:
                reservation.abandon()
                raise

    def commit(
        self,
        item: MissingItem,
        reservation: Reservation,
        dtype: torch.dtype,
        shape: tuple[int, int],
        metadata: EmbeddingMetadata,
    ) -> Lease:
        """Make an entry of a filled reservation, if it may be kept by now; return a lease on it.

        On the event loop, so that no drop comes between the look at the item and the commit.
        """
        lease = reservation.commit(dtype=dtype, shape=shape, metadata=metadata, retain=not item.dropped)
        if item.retained and self._what_if is not None:
            self._what_if.loaded(item.key.hex, reservation.nbytes)
        return lease


def announced_dtype(found: Found) -> torch.dtype:
    """Return the dtype that is announced, if the size is what it makes of the shape.

    Looked at again at the commit; here, before room is made for what may be a wrong size. Raises
    `EmbeddingMismatchError`.
    """
    dtype = getattr(torch, found.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EmbeddingMismatchError("an embedding of an unknown dtype was announced")
    rows, width = found.shape
    if rows * width * dtype.itemsize != found.nbytes:
        raise EmbeddingMismatchError(
            f"{found.nbytes} bytes were announced for {rows} rows of {width} {found.dtype}"
        )
    return dtype
