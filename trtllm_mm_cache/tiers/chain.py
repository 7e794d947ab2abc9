"""Step 5 for one missing embedding: the tiers are asked in order, nearest first."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import EncodeUnavailableError, MmCacheError
from trtllm_mm_cache.tiers.base import Loading, MissingItem, Tier, TierDropped, Wanted, WantedItem
from trtllm_mm_cache.tiers.payload import StoredEmbedding
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.tiers.stored import StoredTier

logger = logging.getLogger(__name__)


class StoredTiers:
    """The tiers of one worker that keep what they are offered, nearest first. For use from one event loop."""

    def __init__(self, tiers: Sequence[StoredTier] = ()) -> None:
        self._tiers = tuple(tiers)

    async def load(
        self, item: WantedItem, receive: Callable[[WantedItem, StoredEmbedding], Awaitable[Lease]]
    ) -> Lease | None:
        """Return a lease on the embedding of `item` from the first tier that has it, or None.

        A tier that fails is a miss there. What one brought, the others are offered.
        """
        for tier in self._tiers:
            try:
                lease = await tier.fill(item, receive)
            except MmCacheError as error:
                logger.warning("tier %s: embedding %s…: %s", tier.name, item.key.hex[:12], error.code)
                continue
            if lease is not None:
                self.offer(item, lease, but=tier)
                return lease
        return None

    def offer(self, item: Wanted, lease: Lease, *, but: StoredTier | None = None) -> None:
        """Note one use of the embedding of `item` in every tier `but` one. See `StoredTier.offer`."""
        for tier in self._tiers:
            if tier is not but:
                tier.offer(item, lease)

    async def drop(self, selection: Selection, *, deadline_s: float) -> TierDropped:
        """Drop in every tier. Raises the first `MmCacheError` when all have been asked."""
        failure: MmCacheError | None = None
        total = TierDropped()
        for tier in self._tiers:
            try:
                dropped = await tier.drop(selection, deadline_s=deadline_s)
                total = TierDropped(*(one + other for one, other in zip(total, dropped, strict=True)))
            except MmCacheError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return total

    async def close(self) -> None:
        """Close every tier."""
        for tier in self._tiers:
            await tier.close()


class TierChain:
    """`Misses` by way of tiers, each with its own deadline. For use from one event loop.

    Those of `stored` are asked first, then `tiers`, which make what none has. A tier that fails is a miss
    there; only the last one's error reaches the request. What a tier brought is offered to the `stored` ones.
    """

    def __init__(self, tiers: Sequence[Tier], receiver: Receiver, stored: StoredTiers | None = None) -> None:
        self._tiers = tuple(tiers)
        self._receiver = receiver
        self._stored = stored or StoredTiers()
        self.flights: SingleFlight[Lease] = SingleFlight(share=Lease.clone, discard=Lease.release)

    async def find(self, item: MissingItem, loading: Loading) -> tuple[Lease, bool]:
        """See `Misses.find`: one flight for each key."""
        if item.key.hex in self.flights:
            item.release_media()
        lease, joined = await self.flights.run(item.key.hex, partial(self._load, item, loading))
        if joined:
            self.used(item, lease)
        return lease, joined

    async def _load(self, item: MissingItem, loading: Loading) -> Lease:
        with loading(item):
            return await self.load(item)

    async def load(self, item: MissingItem) -> Lease:
        """Return a lease on the embedding of `item`. Raises the last tier's error."""
        receive = self._receiver.receive
        if (lease := await self._stored.load(item, receive)) is not None:
            return lease
        last = len(self._tiers) - 1
        for position, tier in enumerate(self._tiers):
            try:
                lease = await tier.fill(item, receive)
            except MmCacheError as error:
                if position == last:
                    raise
                logger.warning("tier %s: embedding %s…: %s", tier.name, item.key.hex[:12], error.code)
                continue
            if lease is not None:
                self._stored.offer(item, lease)
                return lease
        raise EncodeUnavailableError("no tier has the embedding of this item, and none can make it")

    def used(self, item: MissingItem, lease: Lease) -> None:
        """See `Misses.used`."""
        self._stored.offer(item, lease)

    async def drop(self, selection: Selection, *, deadline_s: float) -> TierDropped:
        """See `Misses.drop`."""
        return await self._stored.drop(selection, deadline_s=deadline_s)

    def check_can_fit(self, needs: Mapping[str, int], *, retained: bool) -> None:
        """See `Misses.check_can_fit`."""
        self._receiver.check_can_fit(needs, retained=retained)

    async def close(self) -> None:
        """See `Misses.close`."""
        await self.flights.close()
        await self._stored.close()
        for tier in self._tiers:
            await tier.close()
