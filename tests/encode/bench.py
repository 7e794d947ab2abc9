"""A whole encode worker but for its process: a real tower, a real arena, a real NIXL agent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from dynamo.runtime import Context
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.encode.pipeline import EncodePipeline
from trtllm_mm_cache.encode.server import EncodeServer
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, VisionEncoder
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest, parse_answer
from trtllm_mm_cache.settings import EncodeSettings
from trtllm_mm_cache.transfer import Exporter, TransferAgent


class GatedEncoder:
    """The real encoder; its tower waits at a gate that a test may close, and fails where one says so."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.inner = encoder
        self.open = threading.Event()
        self.reached = threading.Event()
        self.open.set()
        self.fails: Callable[[], Exception] | None = None

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    def preprocess(self, item: EncodeItem) -> Any:
        return self.inner.preprocess(item)

    def prepared_bytes(self, prepared: Any) -> int:
        return self.inner.prepared_bytes(prepared)

    def encode(self, batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        self.reached.set()
        assert self.open.wait(30)
        if self.fails is not None:
            raise self.fails()
        return self.inner.encode(batch)

    def close(self) -> None:
        """The model is that of other tests too."""


class Caller:
    """A request's context without Dynamo's threads, for tests under tracemalloc.

    Those threads may allocate at any time; Python 3.11's `tracemalloc.stop` crashes when one does.
    """

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    def id(self) -> str:
        return "test"

    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def trace_headers(self) -> None:
        """None were sent."""

    async def async_killed_or_stopped(self) -> None:
        await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()


@dataclass
class Bench:
    """A server with its parts, as a PD worker meets it; exports are released by the test instead of READ."""

    server: EncodeServer
    pipeline: EncodePipeline
    manager: MultimodalEmbeddingCacheManager
    exporter: Exporter
    encoder: GatedEncoder
    registry: CollectorRegistry

    @property
    def fingerprint(self) -> str:
        return self.pipeline.fingerprint

    def key(self, media: bytes, salt: str | None = None) -> str:
        return embedding_key(content_digest(media), fingerprint=self.fingerprint, scope=Scope.of(salt)).hex

    def request(
        self, media: bytes, *, retain: bool = True, salt: str | None = None, fresh: bool = False
    ) -> EncodeRequest:
        tag = Scope.of(salt).tag
        return EncodeRequest(
            fingerprint=self.fingerprint,
            key=self.key(media, salt),
            media=media,
            retain=retain,
            fresh=fresh,
            salt_tag=None if tag is None else tag.hex(),
        )

    async def call(
        self, media: bytes, *, retain: bool = True, salt: str | None = None, fresh: bool = False
    ) -> EncodeReady:
        return await self.send(self.request(media, retain=retain, salt=salt, fresh=fresh).model_dump())

    async def send(self, payload: Any) -> EncodeReady:
        """One message in, one message out."""
        return only([answer async for answer in self.server.handle(payload, Context("test"))])

    def embedding(self, ready: EncodeReady) -> torch.Tensor:
        lease = self.manager.lease(ready.key)
        assert lease is not None
        with lease:
            return lease.tensor.clone()


def only(answers: list[dict[str, Any]]) -> EncodeReady:
    """The one answer, or the error that it is."""
    (answer,) = answers
    return parse_answer(answer)


@asynccontextmanager
async def running(
    encoder: VisionEncoder, *, capacity_bytes: int = 1024 * 1024, **settings: Any
) -> AsyncIterator[Bench]:
    agent = await TransferAgent.start()
    manager = MultimodalEmbeddingCacheManager(capacity_bytes)
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    exporter = Exporter(agent, lease_timeout_s=30)
    registry = CollectorRegistry()
    registry.register(exporter)
    gated = GatedEncoder(encoder)
    unchecked = EncodeSettings(model_path="unused").model_copy(update=settings)  # limits may be tiny
    pipeline = EncodePipeline(gated, manager, unchecked, registry)
    server = EncodeServer(pipeline, exporter, agent.metadata, EncodeMetrics(registry))
    yield Bench(server, pipeline, manager, exporter, gated, registry)
    gated.open.set()
    await pipeline.close()
    await agent.close(deadline_s=0.1)
    manager.check_integrity()
    manager.close()
