"""Steps 6 and 7 for one missing embedding: what a tier has ready is read and committed.

    6 fill         the tier writes straight into a reserved extent
    7 commit       only after checksum, size, shape, dtype, rows and values agree

What was found and will not be read is released at once, so that it does not stay leased where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EmbeddingMismatchError,
    EntryTooLargeError,
    InvalidRequestError,
    MmCacheError,
)
from trtllm_mm_cache.observability.metrics import Step, counter
from trtllm_mm_cache.runtime.threads import in_thread
from trtllm_mm_cache.settings import MB
from trtllm_mm_cache.tiers.base import Found, MissingItem

_UNCACHED = "resolver (uncached)"

CheckEmbedding = Callable[[ItemDescription, tuple[int, int], torch.dtype, EmbeddingMetadata], None]
"""`Generator.check_embedding`: raises `EmbeddingMismatchError` for what cannot be the item's embedding."""


class Receiver(Collector):
    """Receives embeddings for one PD worker. For use from one event loop.

    `transit` is a manager that retains nothing; it takes what `cache` has no room for, and is the
    same object as `cache` where the capacity is 0. `what_if` is told what enters the cache.
    `uncached` counts embeddings that were served without entering the cache.
    """

    def __init__(
        self,
        cache: MultimodalEmbeddingCacheManager,
        transit: MultimodalEmbeddingCacheManager,
        what_if: WhatIf | None,
        check: CheckEmbedding,
        registry: CollectorRegistry,
    ) -> None:
        self._cache = cache
        self._transit = transit
        self._what_if = what_if
        self._check = check
        self._reserve_step = Step.new(registry, "reserve", "Before step 6: making room in the arena.")
        self._transfer_step = Step.new(
            registry, "transfer", "Step 6: NIXL READ, or read from a tier, and checks."
        )
        self._commit_step = Step.new(registry, "commit", "Step 7: checks until the entry is visible.")
        self.uncached = 0
        registry.register(self)

    async def receive(self, item: MissingItem, found: Found) -> Lease:
        """Return a lease on the embedding of `item` that a tier has `found`; see `tiers.base.Receive`."""
        try:
            dtype = announced_dtype(found)
            item.needs[item.key.hex] = found.nbytes
            self._check(item.description, found.shape, dtype, found.metadata)
            with self._reserve_step.time():
                reservation = self._reserve_at_once(item, found.nbytes)
                if reservation is None:
                    # In a thread: making room may move other entries, which copies megabytes.
                    reservation = await in_thread(
                        partial(self._reserve, item, found.nbytes), undo=Reservation.abandon
                    )
        except BaseException:
            found.release()
            raise
        self.uncached += reservation.owner == _UNCACHED
        with self._transfer_step.time():
            await found.read_into(reservation, finite=True)
        try:
            with self._commit_step.time():
                lease = reservation.commit(
                    dtype=dtype, shape=found.shape, metadata=found.metadata, retain=not item.dropped
                )
        except MmCacheError:
            reservation.abandon()
            raise
        if item.retained and self._what_if is not None:
            self._what_if.loaded(item.key.hex, found.nbytes)
        return lease

    def check_can_fit(self, needs: Mapping[str, int], *, retained: bool) -> None:
        """Raise `InvalidRequestError` when embeddings of these sizes cannot lie here together, ever.

        A request holds all of them until its answer has ended. Only what is certain is refused: with other
        requests' embeddings out of the way there would still be no room.
        """
        arenas = {self._cache, self._transit} if retained else {self._transit}
        rooms = [arena.budget_bytes for arena in arenas]
        sizes = list(needs.values())
        if sum(sizes) <= sum(rooms) and len(sizes) <= sum(
            room // max(1, min(sizes, default=1)) for room in rooms
        ):
            return
        flags = "--transfer-arena-mb"
        if retained:
            flags += " and --multimodal-embedding-cache-capacity-gb"
        raise InvalidRequestError(
            f"the request's images need {sum(sizes) / MB:.1f} MB for their embeddings at once; this server "
            f"has {sum(rooms) / MB:.1f} MB for them ({flags}): send fewer or smaller images"
        )

    def collect(self) -> Iterable[Metric]:
        """Yield how many embeddings were served uncached."""
        yield counter("uncached", "Embeddings served without entering the cache.", self.uncached)

    def _reserve_at_once(self, item: MissingItem, nbytes: int) -> Reservation | None:
        """Reserve room in the cache where that takes microseconds; a hand-over takes 0.1 ms and more."""
        if not item.retained:
            return None
        with suppress(ArenaFullError, EntryTooLargeError):
            return self._cache.reserve_at_once(
                item.key.hex, nbytes, owner="resolver", tag=item.scope.tag, content=item.watch.content
            )
        return None

    def _reserve(self, item: MissingItem, nbytes: int) -> Reservation:
        """Reserve room in the cache; where every byte is leased, in the transit arena: served, not cached."""
        try:
            if item.retained:
                return self._cache.reserve(
                    item.key.hex,
                    nbytes,
                    owner="resolver",
                    tag=item.scope.tag,
                    content=item.watch.content,
                )
        except (ArenaFullError, EntryTooLargeError):
            if self._transit is self._cache:
                raise
        return self._transit.reserve(item.key.hex, nbytes, owner=_UNCACHED)


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
