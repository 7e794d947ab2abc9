"""The PD worker's memory: the arenas that NIXL READs into, and the reader that fills them.

An aggregated worker's has one arena and no NIXL: its engine fills it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from trtllm_mm_cache.cache.arena.limits import check_fits
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.transfer import MappedReader, Reader, TransferAgent

_CLOSE_DEADLINE_S = 5.0

COPIES_IN_WORKER = frozenset({"transformers"})
"""Engines that copy to the GPU in the PD worker's own process; those of others map the arena themselves."""


@dataclass(frozen=True)
class PdMemory:
    """The cache, the transit arena, and the NIXL reader that fills both.

    With capacity 0 there is one arena only, it retains nothing, and `what_if` is None.
    """

    cache: MultimodalEmbeddingCacheManager
    transit: MultimodalEmbeddingCacheManager
    what_if: WhatIf | None
    agent: TransferAgent
    reader: Reader

    @classmethod
    async def create(cls, settings: PdSettings) -> PdMemory:
        """Commit the memory and register it with NIXL. Raises `ConfigurationError` when it does not fit."""
        arenas = settings.arena_bytes
        capacity, transit_bytes = arenas.values()
        await asyncio.to_thread(check_fits, arenas)
        transit = await asyncio.to_thread(
            MultimodalEmbeddingCacheManager, 0, transfer_bytes=transit_bytes, name="transit"
        )
        cache, what_if = transit, None
        if capacity > 0:
            cache, what_if = await _make_cache(settings, capacity)
        if settings.engine in COPIES_IN_WORKER:
            for manager in {cache, transit}:
                await asyncio.to_thread(manager.arena.page_lock)
        agent = await TransferAgent.start()
        for manager in {cache, transit}:
            await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
        reader = MappedReader(agent) if settings.transfer == "auto" else Reader(agent)
        return cls(cache, transit, what_if, agent, reader)

    @property
    def arenas(self) -> dict[str, MultimodalEmbeddingCacheManager]:
        """The managers by the name of their arena, the cache first."""
        return {manager.name: manager for manager in (self.cache, self.transit)}

    async def close(self) -> None:
        """Close NIXL first, so that nothing is written into memory that is about to go."""
        await self.agent.close(deadline_s=_CLOSE_DEADLINE_S)
        for manager in self.arenas.values():
            manager.close()


@dataclass(frozen=True)
class OwnTowerMemory:
    """The cache of an aggregated worker. With capacity 0 it has no room for any embedding."""

    cache: MultimodalEmbeddingCacheManager
    what_if: WhatIf | None

    @classmethod
    async def create(cls, settings: PdSettings) -> OwnTowerMemory:
        """Commit the memory. Raises `ConfigurationError` when it does not fit."""
        arenas = settings.arena_bytes
        capacity, _ = arenas.values()
        await asyncio.to_thread(check_fits, arenas)
        if capacity > 0:
            return cls(*await _make_cache(settings, capacity))
        return cls(await asyncio.to_thread(MultimodalEmbeddingCacheManager, 0), None)

    @property
    def arenas(self) -> dict[str, MultimodalEmbeddingCacheManager]:
        """The manager by the name of its arena."""
        return {self.cache.name: self.cache}

    async def close(self) -> None:
        """Release the arena."""
        self.cache.close()


async def _make_cache(settings: PdSettings, capacity: int) -> tuple[MultimodalEmbeddingCacheManager, WhatIf]:
    policy = make_policy(settings.multimodal_embedding_cache_policy, capacity)
    cache = await asyncio.to_thread(MultimodalEmbeddingCacheManager, capacity, policy=policy)
    return cache, WhatIf(policy.name, capacity)
