"""Step 5 for one missing embedding: the tiers are asked in order, nearest first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import EncodeUnavailableError, MmCacheError
from trtllm_mm_cache.tiers.base import MissingItem, Tier
from trtllm_mm_cache.tiers.receive import Receiver

logger = logging.getLogger(__name__)


class TierChain:
    """The tiers of one PD worker, each with its own deadline. For use from one event loop.

    A tier that fails is a miss there; only the last one's error reaches the request. What a tier brought is
    offered to those before it.
    """

    def __init__(self, tiers: Sequence[Tier], receiver: Receiver) -> None:
        self._tiers = tuple(tiers)
        self._receiver = receiver

    async def load(self, item: MissingItem) -> Lease:
        """Return a lease on the embedding of `item`. Raises the last tier's error."""
        last = len(self._tiers) - 1
        for position, tier in enumerate(self._tiers):
            try:
                lease = await tier.fill(item, self._receiver.receive)
            except MmCacheError as error:
                if position == last:
                    raise
                logger.warning("tier %s: embedding %s…: %s", tier.name, item.key.hex[:12], error.code)
                continue
            if lease is not None:
                if item.retained:
                    for nearer in self._tiers[:position]:
                        nearer.offer(lease)
                return lease
        raise EncodeUnavailableError("no tier has the embedding of this item, and none can make it")

    def check_can_fit(self, needs: Mapping[str, int], *, retained: bool) -> None:
        """See `Receiver.check_can_fit`."""
        self._receiver.check_can_fit(needs, retained=retained)

    async def close(self) -> None:
        """Close every tier."""
        for tier in self._tiers:
            await tier.close()
