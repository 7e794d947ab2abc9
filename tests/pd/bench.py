"""A resolver with real NIXL between two agents, and a peer encode worker whose answers can be changed."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.e2e.stack import data_url, new_image, png
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import Kind, content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import GenerationRequest, ItemDescription, SamplingParams
from trtllm_mm_cache.errors import EmbeddingMismatchError, MmCacheError
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.pd.request import PdRequest
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.pd.resolved import ResolvedItems
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.runtime.rendezvous import rendezvous_rank
from trtllm_mm_cache.settings import MB, MediaSettings, PdSettings
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.encode_remote import EncodeTier
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.transfer import Exporter, Reader, TransferAgent

ROWS, WIDTH = 16, 64
NBYTES = ROWS * WIDTH * 4
BREAKER_FAILURES, BREAKER_RETRY_S = 3, 10.0
MAX_WAITING_BYTES = 64 * 1024
ENCODE_SECONDS = 0.25
PLACEHOLDER = "<image>" * ROWS
FINGERPRINT = "ab" * 32

Change = Callable[[dict[str, Any]], dict[str, Any]]


def embedding_of(key: str) -> torch.Tensor:
    """The embedding that the peer makes: every key has another one."""
    return torch.full((ROWS, WIDTH), float(struct.unpack("<I", bytes.fromhex(key)[:4])[0]))


@dataclass
class PeerEncodeWorkers:
    """Two encode workers in one, on the interface of `EncodeClient`; it really exports over NIXL.

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

    async def close(self) -> None:
        """Nothing is waited for."""

    async def encode(
        self, instance: int, request: EncodeRequest, unwanted: Callable[[EncodeReady], None]
    ) -> EncodeReady:
        self.calls.append(instance)
        self.retained.append(request.retain)
        await self.gate.wait()
        if instance in self.frozen:
            await asyncio.get_running_loop().create_future()
        if instance in self.fail:
            raise self.fail[instance]
        if self.changes and isinstance(self.changes[0], MmCacheError):
            raise self.changes.pop(0)  # in no variable: this frame and the error would keep each other
        change = self.changes.pop(0) if self.changes else None
        lease = self._stored(request.key)
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
            "placeholder": PLACEHOLDER,
            "encode_seconds": ENCODE_SECONDS,
            "origin": "encoded",
        }
        return EncodeReady.model_validate(change(answer) if change else answer)

    def _stored(self, key: str) -> Lease:
        tensor = embedding_of(key)
        if self.spoil is not None:
            tensor[-1, -1] = self.spoil
        reservation = self.manager.reserve(key, NBYTES, owner="peer")
        reservation.write(tensor)
        return reservation.commit(dtype=tensor.dtype, shape=(ROWS, WIDTH))


@dataclass
class SetClock:
    """A clock that stands still until a test sets it."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def check_embedding(
    item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
) -> None:
    """As an engine's own check, for the one shape that the peer makes."""
    if shape != (ROWS, WIDTH) or dtype != torch.float32 or metadata.placeholder != PLACEHOLDER:
        raise EmbeddingMismatchError("not what this model takes")


def pd_settings(**changes: Any) -> PdSettings:
    """Settings of a PD worker that these tests wait for; unchecked, so that limits may be tiny."""
    settings = PdSettings(model_path="unused", media=MediaSettings(max_fetches=4, media_timeout_s=5))
    defaults = {
        "encode_timeout_s": 5,
        "transfer_timeout_s": 5,
        "breaker_failures": BREAKER_FAILURES,
        "breaker_retry_s": BREAKER_RETRY_S,
        "max_waiting_image_mb": MAX_WAITING_BYTES / MB,
    }
    return settings.model_copy(update=defaults | changes)


def asking(
    references: Sequence[str],
    *,
    salt: str | None = None,
    kind: Kind = "image",
    processor_kwargs: Mapping[str, Any] | None = None,
) -> PdRequest:
    """A request about `references`."""
    generation = GenerationRequest("id", (1,), None, SamplingParams(), salt)
    return PdRequest(
        generation, tuple(Reference(kind, url) for url in references), dict(processor_kwargs or {})
    )


@dataclass
class Bench:
    """A resolver with its cache, and the peer it talks to."""

    peer: PeerEncodeWorkers
    cache: MultimodalEmbeddingCacheManager
    transit: MultimodalEmbeddingCacheManager
    resolver: ItemResolver
    tiers: TierChain
    tier: EncodeTier
    receiver: Receiver
    reader: Reader
    metrics: PdMetrics
    what_if: WhatIf
    clock: SetClock

    async def resolve(
        self, references: Sequence[str], *, salt: str | None = None, variant: str = ""
    ) -> ResolvedItems:
        return await self.resolver.resolve(asking(references, salt=salt), variant=variant)

    async def nothing_held(self) -> None:
        """Wait until no lease, reservation or quarantine is left; what a thread had begun ends by itself."""
        try:
            async with asyncio.timeout(15):
                while self.held() != (0, 0, 0):
                    await asyncio.sleep(0.001)
        except TimeoutError:
            pytest.fail(f"leased, reserved, quarantined: {self.held()}")

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
def settings(require_salt: bool, allow_private_addresses: bool) -> PdSettings:
    media = MediaSettings(max_fetches=4, media_timeout_s=5, allow_private_addresses=allow_private_addresses)
    return pd_settings(multimodal_embedding_cache_require_salt=require_salt, media=media)


@pytest.fixture
async def bench(settings: PdSettings) -> AsyncIterator[Bench]:
    exporting, reading = await TransferAgent.start(), await TransferAgent.start()
    source = MultimodalEmbeddingCacheManager(64 * NBYTES)
    cache = MultimodalEmbeddingCacheManager(4 * NBYTES)
    transit = MultimodalEmbeddingCacheManager(0, transfer_bytes=2 * NBYTES)
    await exporting.register(source.arena.base_address, source.arena.capacity_bytes)
    for manager in (cache, transit):
        await reading.register(manager.arena.base_address, manager.arena.capacity_bytes)
    peer = PeerEncodeWorkers(Exporter(exporting, lease_timeout_s=30), exporting, source)
    peer.gate.set()
    reader = Reader(reading)
    metrics, what_if = PdMetrics(), WhatIf("lru", cache.capacity_bytes)
    clock = SetClock()
    receiver = Receiver(cache, transit, what_if, check_embedding, metrics.registry)
    tier = EncodeTier(peer, reader, FINGERPRINT, settings, metrics.registry, clock)
    tiers = TierChain([tier], receiver)
    resolver = ItemResolver(cache, what_if, tiers, FINGERPRINT, settings, metrics)
    bench = Bench(peer, cache, transit, resolver, tiers, tier, receiver, reader, metrics, what_if, clock)
    yield bench
    await resolver.close()
    await bench.nothing_held()
    for manager in (cache, transit):
        manager.check_integrity()
    await reading.close(deadline_s=5)
    await exporting.close(deadline_s=0.1)  # exports whose READ a test has prevented are not waited for
    for manager in (cache, transit, source):
        manager.close()


def image_url() -> str:
    """Return a new image whose key's home, without a salt, is instance 1 of the two."""
    while True:
        file = png(new_image(32, 32))
        key = embedding_key(content_digest(file), fingerprint=FINGERPRINT)
        if rendezvous_rank(key.digest, [1, 2])[0] == 1:
            return data_url(file)


def admit_all(payload: Any) -> dict[str, Any]:
    """As a PD worker that takes requests without a proof; see `tests/runtime/test_membership.py`."""
    return {}


def assert_holds(lease: Lease) -> None:
    """The lease's view is the embedding that belongs to its key."""
    assert torch.equal(lease.tensor, embedding_of(lease.key))
