"""The encode worker's second level: what a call leaves in its arena. A real tower, a real NIXL agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dynamo.runtime import Context
from tools.tiny_models import make_tiny_model

from tests.e2e.stack import new_picture, png
from trtllm_mm_cache.cache.key import embedding_key
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.config import EncodeSettings
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.transfer import Exporter, TransferAgent
from trtllm_mm_cache.workers.encode_worker import EncodeWorker
from trtllm_mm_cache.workers.protocol import EncodeReady, EncodeRequest, parse_answer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TransformersVisionEncoder:
    model: Path = make_tiny_model("llava", tmp_path_factory.mktemp("model") / "llava")
    return TransformersVisionEncoder(model, TransformersEngineArgs(device="cpu", torch_threads=1))


@dataclass
class Bench:
    """An encode worker with its arena; the exports are given up by the test instead of READ."""

    worker: EncodeWorker
    manager: MultimodalEmbeddingCacheManager
    exporter: Exporter
    fingerprint: str

    async def call(self, media: bytes, *, retain: bool = True, salt: str | None = None) -> EncodeReady:
        key = embedding_key(media, fingerprint=self.fingerprint, salt=salt)
        request = EncodeRequest(fingerprint=self.fingerprint, key=key.hex, media=media, retain=retain)
        answers = [answer async for answer in self.worker.handle(request.model_dump(), Context("test"))]
        assert len(answers) == 1
        return parse_answer(answers[0])


@pytest.fixture
async def bench(encoder: TransformersVisionEncoder) -> AsyncIterator[Bench]:
    agent = await TransferAgent.start()
    manager = MultimodalEmbeddingCacheManager(1024 * 1024)
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    exporter = Exporter(agent, lease_timeout_s=30)
    worker = EncodeWorker(encoder, manager, exporter, agent.metadata, EncodeSettings(model_path="unused"))
    yield Bench(worker, manager, exporter, encoder.fingerprint)
    await worker._flights.close()  # not the worker: it would free the model of the other tests
    await worker._batcher.close()
    worker._threads.shutdown()
    await agent.close(deadline_s=0.1)
    manager.check_integrity()
    manager.close()


async def test_what_may_be_retained_is_a_second_level(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    first, second = [await bench.call(media, retain=True) for _ in range(2)]
    assert (first.origin, second.origin) == ("encoded", "cached")
    assert (first.address, first.checksum) == (second.address, second.checksum)


async def test_what_may_not_be_retained_is_gone_after_its_read(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    for _ in range(2):
        ready = await bench.call(media, retain=False)
        assert ready.origin == "encoded"
        assert bench.manager.keys() == []
        assert bench.manager.statistics().arena.used_bytes == ready.nbytes, "the READ still needs it"
        assert bench.exporter.release(ready.token)
        assert bench.manager.statistics().arena.used_bytes == 0


async def test_a_tenants_embedding_is_no_second_level_for_another(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    asked = [await bench.call(media, salt=salt) for salt in ("a", "a", "b", None, "b")]
    assert [ready.origin for ready in asked] == ["encoded", "cached", "encoded", "encoded", "cached"]
    assert len({ready.key for ready in asked}) == len({ready.address for ready in asked}) == 3
    assert bench.worker._batcher.statistics().images == 3


async def test_tenants_join_no_flight_of_each_other(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    asked = await asyncio.gather(*(bench.call(media, salt=salt) for salt in ("a", "b", "a", "b")))
    assert [ready.origin for ready in asked] == ["encoded", "encoded", "joined", "joined"]
    assert bench.worker._batcher.statistics().images == 2
