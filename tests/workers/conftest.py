"""A resolver with real NIXL between two agents, and a peer encode worker whose answers can be changed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.e2e.stack import data_url, new_picture, png
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import EmbeddingMismatchError, MmCacheError
from trtllm_mm_cache.media import MediaSettings, MediaSource
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.transfer import Exporter, Reader, TransferAgent
from trtllm_mm_cache.tiers.breaker import CircuitBreakers
from trtllm_mm_cache.tiers.loader import EmbeddingLoader
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.pd.resolved_images import ResolvedItems
from trtllm_mm_cache.pd.resolve import ItemResolver

ROWS, WIDTH = 16, 64
NBYTES = ROWS * WIDTH * 4
BREAKER_FAILURES, BREAKER_RETRY_S = 3, 10.0
MAX_WAITING_BYTES = 64 * 1024
ENCODE_SECONDS = 0.25

Change = Callable[[dict[str, Any]], dict[str, Any]]


def embedding_of(key: str) -> torch.Tensor:
    """The embedding that the peer makes: every key has another one."""
    return torch.full((ROWS, WIDTH), float(struct.unpack("<I", bytes.fromhex(key)[:4])[0]))


@dataclass
class PeerEncodeWorkers:
    """Two encode workers in one, on the interface of `EncodeClient`; really exports over NIXL.

    `changes` are for the next answers, `fail` and `frozen` for instances, `spoil` is a value to put in.
    """

    exporter: Exporter
    agent: TransferAgent
    manager: MultimodalEmbeddingCacheManager
    instances: list[int] = field(default_factory=lambda: [1, 2])
    changes: list[Change | MmCacheError] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    retained: list[bool] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail: dict[int, MmCacheError] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    spoil: float | None = None

    def rank(self, key: EmbeddingKey) -> list[int]:
        return sorted(self.instances)

    async def close(self) -> None:
        """Nothing is waited for."""

    async def encode(self, instance: int, request: EncodeRequest) -> EncodeReady:
        self.calls.append(instance)
        self.retained.append(request.retain)
        await self.gate.wait()
        if instance in self.frozen:
            await asyncio.get_running_loop().create_future()
        if instance in self.fail:
            raise self.fail[instance]
        change = self.changes.pop(0) if self.changes else None
        if isinstance(change, MmCacheError):
            raise change
        metadata = {"rows": ROWS}
        self.manager.set(request.key, CachedEmbedding(self._embedding(request.key), metadata=metadata))
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

    def _embedding(self, key: str) -> torch.Tensor:
        tensor = embedding_of(key)
        if self.spoil is not None:
            tensor[-1, -1] = self.spoil
        return tensor


@dataclass
class SetClock:
    """A clock that stands still until a test sets it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def check_embedding(
    image: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: Mapping[str, Any]
) -> None:
    """As an engine's own check, for the one shape that the peer makes."""
    if shape != (ROWS, WIDTH) or dtype != torch.float32 or metadata.get("rows") != ROWS:
        raise EmbeddingMismatchError("not what this model takes")


@dataclass
class Bench:
    """A resolver with its cache, and the peer it talks to."""

    peer: PeerEncodeWorkers
    cache: MultimodalEmbeddingCacheManager
    transit: MultimodalEmbeddingCacheManager
    resolver: ItemResolver
    loader: EmbeddingLoader
    reader: Reader
    metrics: PdMetrics
    what_if: WhatIf
    clock: SetClock

    async def resolve(self, references: Sequence[str], *, salt: str | None = None) -> ResolvedItems:
        return await self.resolver.resolve(references, processor_kwargs={}, salt=salt, variant="")

    async def nothing_held(self) -> None:
        """Wait until no lease, reservation or quarantine is left; what a thread had begun ends by itself."""
        try:
            async with asyncio.timeout(15):
                while self.held() != (0, 0, 0):
                    await asyncio.sleep(0.001)
        except TimeoutError:
            pytest.fail(f"leased, reserved, quarantined: {self.held()}; {self.reader.statistics()}")

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
def allow_private_addresses() -> bool:
    return False


@pytest.fixture
def reject_non_finite() -> bool:
    return True


@pytest.fixture
async def bench(
    require_salt: bool, allow_private_addresses: bool, reject_non_finite: bool
) -> AsyncIterator[Bench]:
    exporting, reading = await TransferAgent.start(), await TransferAgent.start()
    source = MultimodalEmbeddingCacheManager(64 * NBYTES)
    cache = MultimodalEmbeddingCacheManager(4 * NBYTES)
    transit = MultimodalEmbeddingCacheManager(0, transfer_bytes=2 * NBYTES)
    await exporting.register(source.arena.base_address, source.arena.capacity_bytes)
    for manager in (cache, transit):
        await reading.register(manager.arena.base_address, manager.arena.capacity_bytes)
    peer = PeerEncodeWorkers(Exporter(exporting, lease_timeout_s=30), exporting, source)
    peer.gate.set()
    settings = MediaSettings(allow_private_addresses=allow_private_addresses)
    reader = Reader(reading)
    metrics, what_if = PdMetrics(), WhatIf("lru", cache.capacity_bytes)
    clock = SetClock()
    loader = EmbeddingLoader(
        cache=cache,
        transit=transit,
        encoders=peer,
        breakers=CircuitBreakers(failures=BREAKER_FAILURES, retry_s=BREAKER_RETRY_S, clock=clock),
        reader=reader,
        fingerprint="ab" * 32,
        check=check_embedding,
        reject_non_finite=reject_non_finite,
        encode_timeout_s=5,
        transfer_timeout_s=5,
        metrics=metrics,
        what_if=what_if,
    )
    resolver = ItemResolver(
        source=MediaSource(settings),
        media_settings=settings,
        cache=cache,
        loader=loader,
        fingerprint="ab" * 32,
        max_fetches=4,
        fetch_wait_s=5,
        max_waiting_bytes=MAX_WAITING_BYTES,
        metrics=metrics,
        require_salt=require_salt,
        what_if=what_if,
    )
    bench = Bench(peer, cache, transit, resolver, loader, reader, metrics, what_if, clock)
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
