"""Where a disaggregated PD worker puts what its tiers have found: the cache, else the transit arena."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EntryTooLargeError,
    InvalidRequestError,
)
from trtllm_mm_cache.observability.metrics import counter
from trtllm_mm_cache.settings import MB
from trtllm_mm_cache.threads import in_thread
from trtllm_mm_cache.tiers.base import Found, MissingItem
from trtllm_mm_cache.tiers.intake import CheckEmbedding, Intake

_UNCACHED = "resolver (uncached)"


class Receiver(Collector):
    """Receives embeddings for one PD worker. For use from one event loop.

    `transit` is a manager that retains nothing; it takes what `cache` has no room for, and is the same
    object as `cache` where the capacity is 0. `what_if` is told what enters the cache. `uncached` counts
    embeddings that were served without entering the cache.
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
        self._intake = Intake(check, what_if, registry)
        self.uncached = 0
        registry.register(self)

    async def receive(self, item: MissingItem, found: Found) -> Lease:
        """Return a lease on the embedding of `item` that a tier has `found`; see `tiers.base.Receive`."""
        return await self._intake.take(item, found, self._make_room)

    async def _make_room(self, item: MissingItem, nbytes: int) -> Reservation:
        reservation = self._reserve_at_once(item, nbytes)
        if reservation is None:
            # In a thread: making room may move other entries, which copies megabytes.
            reservation = await in_thread(partial(self._reserve, item, nbytes), undo=Reservation.abandon)
        self.uncached += reservation.owner == _UNCACHED
        return reservation

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
