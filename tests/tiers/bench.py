"""Stored tiers over real files and a real store, with a real arena to fill."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from prometheus_client import CollectorRegistry

from tests.e2e.stack import free_port, wait_until
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import EmbeddingKey, content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.observability.metrics import Step
from trtllm_mm_cache.runtime.drops import DropWatch
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Sealer
from trtllm_mm_cache.tiers.limits import TierLimits
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.tiers.rules import EntryRules
from trtllm_mm_cache.tiers.storage import Storage
from trtllm_mm_cache.tiers.stored import StoredTier

ROWS, WIDTH = 256, 64
NBYTES = ROWS * WIDTH * 4
FILE_BYTES = HEADER_BYTES + NBYTES
FINGERPRINT = "ab" * 32
SECRET = b"a secret of thirty-two bytes or so"
METADATA = EmbeddingMetadata((1, 16, 16), "<image>" * ROWS, 0.25, 12345)

Kind = Literal["disk", "store"]


def item_of(number: int, *, salt: str | None = None, retain: bool = True) -> MissingItem:
    """The `number`-th item."""
    content = content_digest(f"image {number}".encode())
    scope = Scope.of(salt)
    if not retain:
        scope = Scope(retain=False)
    key = embedding_key(content, fingerprint=FINGERPRINT, scope=scope)
    watch = DropWatch(scope.tag)
    watch.content = content
    return MissingItem(key, b"", ItemDescription(32, 32), scope, watch)


def tensor_of(key: EmbeddingKey) -> torch.Tensor:
    """The embedding that belongs to a key."""
    generator = torch.Generator().manual_seed(int.from_bytes(key.digest[:7], "big"))
    return torch.rand(ROWS, WIDTH, generator=generator)


def name_of(item: MissingItem) -> EntryName:
    return EntryName(item.key.hex, item.scope.tag)


@dataclass
class SetTime:
    """A clock that a test sets."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """An arena, and tiers made on demand: each `tier` call is another process, as far as a tier can tell."""

    make_storage: Callable[..., Storage]
    cache: MultimodalEmbeddingCacheManager
    receiver: Receiver
    clock: SetTime = field(default_factory=SetTime)
    wall: SetTime = field(default_factory=SetTime)
    tiers: list[StoredTier] = field(default_factory=list)

    def tier(
        self,
        *,
        secret: bytes = SECRET,
        fingerprint: str = FINGERPRINT,
        max_age_s: float | None = None,
        storage: Storage | None = None,
        **limits: Any,
    ) -> StoredTier:
        rules = EntryRules(Sealer(secret), fingerprint, max_age_s=max_age_s, clock=self.wall)
        made = storage or self.make_storage(fingerprint=fingerprint)
        # Deadlines that a busy machine meets; what they do is tested where one is set.
        limits = {"lookup_s": 5.0, "fetch_s": 5.0, "at_use": 1} | limits
        seconds = Step.new(CollectorRegistry(), "tier", "One call.", "tier", "step")
        tier = StoredTier(made, rules, TierLimits(**limits), seconds, self.clock)
        if storage is None and not self.tiers:
            wait_until(
                lambda: made.writes, 30, "the first tier does not write"
            )  # one that comes later cannot
        self.tiers.append(tier)
        return tier

    def committed(self, item: MissingItem) -> Lease:
        """What an encode worker would have brought."""
        reservation = self.cache.reserve(
            item.key.hex, NBYTES, owner="test", tag=item.scope.tag, content=item.content
        )
        reservation.write(tensor_of(item.key))
        return reservation.commit(dtype=torch.float32, shape=(ROWS, WIDTH), metadata=METADATA)

    async def keep(self, tier: StoredTier, *items: MissingItem) -> None:
        """Have `tier` store the embeddings of `items`, and forget them here."""
        for item in items:
            before = sum(tier.offers.outcomes.values())
            with self.committed(item) as lease:
                tier.offer(item, lease)
            await until(lambda: sum(tier.offers.outcomes.values()) > before)  # noqa: B023
            self.cache.drop(item.key.hex)

    async def brought(self, tier: StoredTier, item: MissingItem) -> bool:
        """Whether `tier` brings the embedding of `item`: the right one, or this fails."""
        lease = await tier.fill(item, self.receiver.receive)
        if lease is None:
            return False
        with lease:
            assert torch.equal(lease.tensor, tensor_of(item.key)), "a wrong answer"
            assert lease.metadata == METADATA
        self.cache.drop(item.key.hex)
        return True

    async def nothing_held(self) -> None:
        def held() -> tuple[int, int, int]:
            one = self.cache.statistics()
            return one.leased_bytes, one.reservations, one.quarantined

        await until(lambda: held() == (0, 0, 0))


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what a thread is about to do."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def accept(*_: Any) -> None:
    """Every embedding fits every item here."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on a disk of this user alone; not below pytest's, whose names are long."""
    made = Path(tempfile.mkdtemp(prefix="tiers-"))
    yield made / "entries"
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def redis_running(*options: str, port: int | None = None) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A Redis server of this test alone, on loopback; skips where there is none."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    port = port or free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, cwd="/tmp") as server:  # noqa: S108
        try:
            for _ in range(2000):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert server.poll() is None, "redis-server has ended"
                time.sleep(0.005)
            yield port, server
        finally:
            server.kill()


@pytest.fixture
def redis_server() -> Iterator[int]:
    with redis_running() as (port, _):
        yield port


@pytest.fixture(params=["disk", "store"])
def tier_kind(request: pytest.FixtureRequest) -> Kind:
    """Every test of the contract runs over every storage."""
    kind: Kind = request.param
    return kind


@pytest.fixture
async def bench(tier_kind: Kind, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    def make(*, fingerprint: str = FINGERPRINT) -> Storage:
        if tier_kind == "disk":
            return DiskStorage(folder, fingerprint, 64 * 1024 * 1024)
        pytest.importorskip("redis", reason="the store's client is not installed: the extra `store`")
        from trtllm_mm_cache.tiers.store import StoreStorage

        port = request.getfixturevalue("redis_server")
        return StoreStorage(f"redis://127.0.0.1:{port}/0", fingerprint, timeout_s=5)

    cache = MultimodalEmbeddingCacheManager(16 * NBYTES)
    transit = MultimodalEmbeddingCacheManager(0, transfer_bytes=2 * NBYTES)
    receiver = Receiver(cache, transit, None, accept, CollectorRegistry())
    made = Bench(make, cache, receiver)
    yield made
    for tier in made.tiers:
        await tier.close()
    await made.nothing_held()
    for manager in (cache, transit):
        manager.check_integrity()
        manager.close()
