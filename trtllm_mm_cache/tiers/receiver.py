"""Steps 6 and 7 for one missing embedding: what an encode worker has ready is READ and committed.

    6 READ         NIXL reads straight into a reserved extent
    7 commit       only after checksum, size, shape, dtype, rows and values agree

An export that will not be READ is given up at once, so that it does not stay pinned in the encode worker's
arena until its lease times out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import ArenaFullError, EmbeddingMismatchError, EntryTooLargeError, MmCacheError
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.runtime.messages import ENCODE_SECONDS, EncodeReady, EncodeRequest
from trtllm_mm_cache.runtime.threads import in_thread
from trtllm_mm_cache.tiers.missing_image import MissingItem
from trtllm_mm_cache.transfer import Export, PeerMetadata, Reader

_UNCACHED = "resolver (uncached)"

EmbeddingCheck = Callable[[ItemDescription, tuple[int, int], torch.dtype, Mapping[str, Any]], None]
"""`Generator.check_embedding`: raises `EmbeddingMismatchError` for what cannot be the image's embedding."""


class EmbeddingReceiver:
    """Receives embeddings for one PD worker. For use from one event loop.

    `transit` is a manager that retains nothing; it takes what `cache` has no room for, and is the
    same object as `cache` where the capacity is 0. `what_if` is told what enters the cache.
    """

    def __init__(
        self,
        *,
        cache: MultimodalEmbeddingCacheManager,
        transit: MultimodalEmbeddingCacheManager,
        reader: Reader,
        check: EmbeddingCheck,
        reject_non_finite: bool,
        timeout_s: float,
        metrics: PdMetrics,
        what_if: WhatIf | None,
    ) -> None:
        self._cache = cache
        self._transit = transit
        self._reader = reader
        self._check = check
        self._reject_non_finite = reject_non_finite
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._what_if = what_if
        self._uncached = 0

    @property
    def uncached(self) -> int:
        """How many embeddings since start were served without entering the cache."""
        return self._uncached

    async def receive(self, image: MissingItem, request: EncodeRequest, ready: EncodeReady) -> Lease:
        """Return a lease on the embedding of `image` that an encode worker has `ready` after `request`.

        Raises `TransferError`, `ProtocolMismatchError` or `CacheError`. What was exported has then been given
        up, and what was reserved is free again, or in quarantine until its READ has settled.
        """
        peer = PeerMetadata.from_wire(ready.peer)
        try:
            ready.check_answers(request)
            dtype = _dtype(ready)
            self._check(image.description, ready.shape, dtype, ready.metadata)
            # In a thread: making room may move other entries, which copies megabytes.
            reserve = partial(self._reserve, image, ready.nbytes)
            with self._metrics.reserve.time():
                reservation = await in_thread(reserve, undo=Reservation.abandon)
        except BaseException:
            self._reader.give_up(peer, ready.token)
            raise
        self._uncached += reservation.owner == _UNCACHED
        export = Export(ready.token, ready.address, ready.nbytes, ready.checksum)
        with self._metrics.transfer.time():
            await self._reader.read_into(
                reservation,
                peer,
                export,
                deadline_s=self._timeout_s,
                finite_dtype=ready.dtype if self._reject_non_finite else None,
            )
        metadata = {**ready.metadata, ENCODE_SECONDS: ready.encode_seconds}
        try:
            with self._metrics.commit.time():
                lease = reservation.commit(
                    dtype=dtype, shape=ready.shape, metadata=metadata, retain=not image.dropped
                )
        except MmCacheError:
            reservation.abandon()
            raise
        if image.retained and self._what_if is not None:
            self._what_if.loaded(image.key.hex, ready.nbytes)
        return lease

    def _reserve(self, image: MissingItem, nbytes: int) -> Reservation:
        """Reserve room in the cache; where every byte is leased, in the transit arena: served, not cached."""
        try:
            if image.retained:
                return self._cache.reserve(image.key.hex, nbytes, owner="resolver", tag=image.passage.tag)
        except (ArenaFullError, EntryTooLargeError):
            if self._transit is self._cache:
                raise
        return self._transit.reserve(image.key.hex, nbytes, owner=_UNCACHED)


def _dtype(ready: EncodeReady) -> torch.dtype:
    """Return the dtype that is announced, if the size is what it makes of the shape.

    Looked at again at the commit; here, before room is made for what may be a wrong size.
    """
    dtype = getattr(torch, ready.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EmbeddingMismatchError("the encode worker announced an embedding of an unknown dtype")
    rows, width = ready.shape
    if rows * width * dtype.itemsize != ready.nbytes:
        raise EmbeddingMismatchError(
            f"the encode worker announced {ready.nbytes} bytes for {rows} rows of {width} {ready.dtype}"
        )
    return dtype
