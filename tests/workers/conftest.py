"""A resolver with real NIXL between two agents, and a peer encode worker whose answers can be changed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.e2e.stack import data_url, new_picture, png
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import MediaSettings, MediaSource
from trtllm_mm_cache.observability.pd_metrics import PdMetrics
from trtllm_mm_cache.transfer import Exporter, Reader, TransferAgent
from trtllm_mm_cache.workers.protocol import EncodeReady, EncodeRequest
from trtllm_mm_cache.workers.resolver import ImageResolver, ResolvedImages

ROWS, WIDTH = 16, 64
NBYTES = ROWS * WIDTH * 4
ENCODE_SECONDS = 0.25

Change = Callable[[dict[str, Any]], dict[str, Any]]


def embedding_of(key: str) -> torch.Tensor:
    """The embedding that the peer makes: every key has another one."""
    return torch.full((ROWS, WIDTH), float(struct.unpack("<I", bytes.fromhex(key)[:4])[0]))


@dataclass
class PeerEncodeWorkers:
    """Two encode workers in one, on the interface of `EncodeClient`; really exports over NIXL."""

    exporter: Exporter
    agent: TransferAgent
    manager: MultimodalEmbeddingCacheManager
    instances: list[int] = field(default_factory=lambda: [1, 2])
    changes: list[Change | MmCacheError] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    retained: list[bool] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def rank(self, key: EmbeddingKey) -> list[int]:
        return sorted(self.instances)

    async def encode(self, instance: int, request: EncodeRequest) -> EncodeReady:
        self.calls.append(instance)
        self.retained.append(request.retain)
        await self.gate.wait()
        change = self.changes.pop(0) if self.changes else None
        if isinstance(change, MmCacheError):
            raise change
        metadata = {"rows": ROWS}
        self.manager.set(request.key, CachedEmbedding(embedding_of(request.key), metadata=metadata))
        lease = self.manager.lease(request.key)
        assert lease is not None
        export = await self.exporter.export(lease)
        answer = {
            "fingerprint": request.fingerprint,
            "key": request.key,
            "peer": self.agent.metadata.to_wire(),
            "token": export.token,
            "address": export.address,
            "nbytes": export.nbytes,
            "checksum": export.checksum,
            "dtype": "float32",
            "shape": (ROWS, WIDTH),
            "metadata": metadata,
            "encode_seconds": ENCODE_SECONDS,
            "origin": "encoded",
        }
        return EncodeReady.model_validate(change(answer) if change else answer)


@dataclass
class Bench:
    """A resolver with its cache, and the peer it talks to."""

    peer: PeerEncodeWorkers
    cache: MultimodalEmbeddingCacheManager
    transit: MultimodalEmbeddingCacheManager
    resolver: ImageResolver
    reader: Reader
    metrics: PdMetrics
    what_if: WhatIf

    async def resolve(self, references: Sequence[str], *, salt: str | None = None) -> ResolvedImages:
        return await self.resolver.resolve(references, processor_kwargs={}, salt=salt, variant="")

    async def nothing_held(self) -> None:
        """Wait until no lease, reservation or quarantine is left; what a thread had begun ends by itself."""
        async with asyncio.timeout(5):
            while self.held() != (0, 0, 0):
                await asyncio.sleep(0.001)

    def held(self) -> tuple[int, int, int]:
        statistics = [manager.statistics() for manager in (self.cache, self.transit)]
        return (
            sum(one.leased_bytes for one in statistics),
            sum(one.reservations for one in statistics),
            sum(one.quarantined for one in statistics),
        )


@pytest.fixture
def require_salt() -> bool:
    return False


@pytest.fixture
async def bench(require_salt: bool) -> AsyncIterator[Bench]:
    exporting, reading = await TransferAgent.start(), await TransferAgent.start()
    source = MultimodalEmbeddingCacheManager(64 * NBYTES)
    cache = MultimodalEmbeddingCacheManager(4 * NBYTES)
    transit = MultimodalEmbeddingCacheManager(0, transfer_bytes=2 * NBYTES)
    await exporting.register(source.arena.base_address, source.arena.capacity_bytes)
    for manager in (cache, transit):
        await reading.register(manager.arena.base_address, manager.arena.capacity_bytes)
    peer = PeerEncodeWorkers(Exporter(exporting, lease_timeout_s=30), exporting, source)
    peer.gate.set()
    settings = MediaSettings()
    reader = Reader(reading)
    metrics, what_if = PdMetrics(), WhatIf("lru", cache.capacity_bytes)
    resolver = ImageResolver(
        source=MediaSource(settings),
        media_settings=settings,
        cache=cache,
        transit=transit,
        client=peer,
        reader=reader,
        fingerprint="ab" * 32,
        encode_timeout_s=5,
        transfer_timeout_s=5,
        metrics=metrics,
        require_salt=require_salt,
        what_if=what_if,
    )
    bench = Bench(peer, cache, transit, resolver, reader, metrics, what_if)
    yield bench
    await resolver.close()
    await bench.nothing_held()
    for manager in (cache, transit):
        manager.check_integrity()
    await reading.close(deadline_s=5)
    await exporting.close(deadline_s=0.1)  # exports whose READ a test has prevented are not waited for
    for manager in (cache, transit, source):
        manager.close()


def picture() -> str:
    return data_url(png(new_picture(32, 32)))


def assert_holds(lease: Lease) -> None:
    """The lease's view is the embedding that belongs to its key."""
    assert torch.equal(lease.embedding.tensor, embedding_of(lease.key))
