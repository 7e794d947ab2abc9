"""This project's two ends of `transfer.py`: the real encode worker and the PD worker's real chain of tiers.

Only the model is left out: the "vision tower" hands over a tensor that it has ready.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from dynamo.runtime import Context
from prometheus_client import CollectorRegistry

from benchmarks.dataset import picture
from benchmarks.transfer_ends import ARENA_BYTES, Receiver, Sender, Times, ask
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.encode.pipeline import EncodePipeline
from trtllm_mm_cache.encode.server import EncodeServer
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, ItemDescription
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.runtime.drops import DropWatch
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest, parse_answer
from trtllm_mm_cache.settings import EncodeSettings, PdSettings
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.encode_remote import EncodeTier
from trtllm_mm_cache.tiers.receive import Receiver as ItemReceiver
from trtllm_mm_cache.transfer import Export, Exporter, MappedReader, Reader, TransferAgent
from trtllm_mm_cache.transfer.finite import Pass

FINGERPRINT = "ab" * 32
WIDTH = 1024


class ReadyTower:
    """A `VisionEncoder` whose embeddings are there already, as float16; the request says how many bytes."""

    def __init__(self) -> None:
        self._ready = [torch.rand(ARENA_BYTES // 8 // WIDTH, WIDTH).half() for _ in range(2)]
        self.ended_at = 0.0

    @property
    def fingerprint(self) -> str:
        """That of no model."""
        return FINGERPRINT

    def preprocess(self, item: EncodeItem) -> int:
        """Return how many rows the request asks for."""
        return int(item.processor_kwargs["nbytes"]) // (2 * WIDTH)

    def prepared_bytes(self, prepared: int) -> int:
        """Return 0: nothing is held but a number."""
        del prepared
        return 0

    def encode(self, batch: Sequence[int]) -> list[EncodedItem | MmCacheError]:
        """Hand over a part of what is there, of another tensor each time."""
        self._ready.reverse()
        results: list[EncodedItem | MmCacheError] = [
            EncodedItem(self._ready[0][:rows], EmbeddingMetadata(grid_thw=(1, rows, 4))) for rows in batch
        ]
        self.ended_at = time.perf_counter()
        return results

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class OurSender(Sender):
    """The encode worker. Seconds: from the end of the tower to the reply."""

    server: EncodeServer
    tower: ReadyTower

    async def reply(self, request: Any) -> tuple[Any, float]:
        """Answer an `EncodeRequest`."""
        replies = [reply async for reply in self.server.handle(request, Context("benchmark"))]
        return replies[0], time.perf_counter() - self.tower.ended_at


@asynccontextmanager
async def our_sender() -> AsyncIterator[Sender]:
    """Make an encode worker."""
    manager, agent = await _arena_and_agent()
    tower = ReadyTower()
    registry = CollectorRegistry()
    pipeline = EncodePipeline(tower, manager, EncodeSettings(model_path="none"), registry)
    exporter = Exporter(agent, lease_timeout_s=30)
    try:
        peer = agent.metadata.with_arena(manager.arena.place)
        yield OurSender(EncodeServer(pipeline, exporter, peer, EncodeMetrics(registry)), tower)
    finally:
        await pipeline.close()
        await agent.close(deadline_s=1)
        manager.close()


class _EncodeWorkerOverThere:
    """The tier's `EncodeWorkers`; notes when the reply is here."""

    instances = [1]  # noqa: RUF012

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.replied_at = self.send_s = 0.0

    async def encode(
        self, instance: int, request: EncodeRequest, unwanted: Callable[[EncodeReady], None]
    ) -> EncodeReady:
        """Ask the one instance."""
        reply, self.send_s = await ask(self._connection, request.model_dump())
        self.replied_at = time.perf_counter()
        return parse_answer(reply)

    async def close(self) -> None:
        """Nothing waits."""


@dataclass
class OurReceiver(Receiver):
    """The tiers of the PD worker. Seconds: from the reply to a lease on the committed entry."""

    tiers: TierChain
    peer: _EncodeWorkerOverThere
    media: bytes

    async def receive(self, nbytes: int) -> Times:
        """Load an embedding of `nbytes` bytes under a key that is new."""
        description = ItemDescription(0, 0, {"nbytes": nbytes})
        key = EmbeddingKey(secrets.token_bytes(32))
        lease = await self.tiers.load(MissingItem(key, self.media, description, Scope(), DropWatch(None)))
        there_at = time.perf_counter()
        if lease.nbytes != nbytes:
            raise RuntimeError(f"{lease.nbytes} bytes came instead of {nbytes}")
        lease.release()
        seconds = there_at - self.peer.replied_at  # it arrives in its place in the cache
        return Times(self.peer.send_s, seconds, seconds)


@asynccontextmanager
async def our_receiver(connection: Connection, way: str) -> AsyncIterator[Receiver]:
    """Make a PD worker's cache and the tiers that fill it."""
    manager, agent = await _arena_and_agent()
    peer = _EncodeWorkerOverThere(connection)
    registry = CollectorRegistry()
    # No model, so nothing that rows could disagree with.
    receiver = ItemReceiver(manager, manager, None, lambda *_: None, registry)
    settings = PdSettings(model_path="none", transfer_timeout_s=30)
    fingerprint = pixels_fingerprint(FINGERPRINT, settings.images)
    if way == "ours_unchecked":
        look_at_nothing()
    reader = READERS[way](agent)
    tiers = TierChain([EncodeTier(peer, reader, fingerprint, settings, registry)], receiver)
    try:
        yield OurReceiver(tiers, peer, picture(1, 32))
    finally:
        await tiers.close()
        await agent.close(deadline_s=1)
        manager.close()


class UncheckedReader(Reader):
    """`--transfer nixl` that takes whatever comes: beside it shows what the checks cost."""

    def _judge(self, reservation: Reservation, export: Export, found: int, *, finite: bool) -> None:
        """Nothing was looked at."""


def look_at_nothing() -> None:
    """Have this process's READs pass by their bytes."""

    def passed(self: Pass, nbytes: int, *, source: int | None = None) -> None:
        self.checked += nbytes

    Pass.advance = passed  # type: ignore[method-assign]


READERS = {"ours": MappedReader, "ours_nixl": Reader, "ours_unchecked": UncheckedReader}


async def _arena_and_agent() -> tuple[MultimodalEmbeddingCacheManager, TransferAgent]:
    manager = await asyncio.to_thread(MultimodalEmbeddingCacheManager, ARENA_BYTES)
    agent = await TransferAgent.start()
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    return manager, agent
