"""The seam of step 5: what a PD worker does about items that its arena lacks.

With encode workers it is `chain.TierChain`, in an aggregated worker `own_tower.OwnTower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.observability.cache_metrics import FlightCounts
from trtllm_mm_cache.tiers.base import Loading, MissingItem, TierDropped
from trtllm_mm_cache.tiers.filling import HeldFilling


class Misses(Protocol):
    """How one PD worker comes by the embeddings that its arena lacks. For use from one event loop."""

    @property
    def flights(self) -> FlightCounts:
        """How many are under way, and how many wait for them."""
        ...

    async def find(self, item: MissingItem, loading: Loading) -> tuple[Lease | HeldFilling, bool]:
        """Return what stands for the embedding of `item`, and whether another request brings or brought it.

        One at a time does for each key. Raises the error of what would have made it, and `OverloadedError`
        when too much is under way.
        """
        ...

    def used(self, item: MissingItem, lease: Lease) -> None:
        """Note that the arena served the embedding of `item`: a tier may store it, or note its use."""
        ...

    async def drop(self, selection: Selection, *, deadline_s: float) -> TierDropped:
        """Drop in every tier that keeps embeddings. Raises the first error when all have been asked."""
        ...

    def check_can_fit(self, needs: Mapping[str, int], *, retained: bool) -> None:
        """Raise `InvalidRequestError` when embeddings of these sizes can never lie in the arenas together."""
        ...

    async def close(self) -> None:
        """Cancel what is under way and close every tier."""
        ...
