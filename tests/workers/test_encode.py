"""The encode worker's second level: what a call leaves in its arena. A real tower, a real NIXL agent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dynamo.runtime import Context

from tests.e2e.stack import new_picture, png
from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.key import embedding_key
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import salt_tag
from trtllm_mm_cache.encode.server import EncodeWorker
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, VisionEncoder
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.errors import EncodeOverloadedError, MmCacheError
from trtllm_mm_cache.runtime.control import DropRequest
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest, parse_answer
from trtllm_mm_cache.settings import EncodeSettings
from trtllm_mm_cache.transfer import Exporter, TransferAgent


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TransformersVisionEncoder:
    model: Path = make_tiny_model("llava", tmp_path_factory.mktemp("model") / "llava")
    return TransformersVisionEncoder(model, TransformersEngineArgs(device="cpu", torch_threads=1))


class GatedEncoder:
    """The real encoder; its tower waits at a gate that a test may close."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.open = threading.Event()
        self.reached = threading.Event()
        self.open.set()

    @property
    def fingerprint(self) -> str:
        return self._encoder.fingerprint

    def preprocess(self, item: EncodeItem) -> Any:
        return self._encoder.preprocess(item)

    def encode(self, batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        self.reached.set()
        assert self.open.wait(30)
        return self._encoder.encode(batch)

    def close(self) -> None:
        """The model is that of other tests too."""


@dataclass
class Bench:
    """An encode worker with its arena; the exports are given up by the test instead of READ."""

    worker: EncodeWorker
    manager: MultimodalEmbeddingCacheManager
    exporter: Exporter
    encoder: GatedEncoder

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    def key(self, media: bytes, salt: str | None = None) -> str:
        return embedding_key(media, fingerprint=self.fingerprint, salt=salt).hex

    async def call(
        self, media: bytes, *, retain: bool = True, salt: str | None = None, fresh: bool = False
    ) -> EncodeReady:
        request = EncodeRequest(
            fingerprint=self.fingerprint,
            key=self.key(media, salt),
            media=media,
            retain=retain,
            fresh=fresh,
            salt_tag=salt_tag(salt).hex() if salt else None,
        )
        answers = [answer async for answer in self.worker.handle(request.model_dump(), Context("test"))]
        assert len(answers) == 1
        return parse_answer(answers[0])


@pytest.fixture
async def bench(encoder: TransformersVisionEncoder) -> AsyncIterator[Bench]:
    agent = await TransferAgent.start()
    manager = MultimodalEmbeddingCacheManager(1024 * 1024)
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    exporter = Exporter(agent, lease_timeout_s=30)
    gated = GatedEncoder(encoder)
    worker = EncodeWorker(gated, manager, exporter, agent.metadata, EncodeSettings(model_path="unused"))
    yield Bench(worker, manager, exporter, gated)
    gated.open.set()
    await worker.close()
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


def drops(bench: Bench, media: bytes) -> dict[str, DropRequest]:
    return {
        "its key": DropRequest(key=bench.key(media, "one")),
        "its salt": DropRequest(tag=salt_tag("one").hex()),
        "everything": DropRequest(everything=True),
        "another key": DropRequest(key=bench.key(b"other", "one")),
        "another salt": DropRequest(tag=salt_tag("two").hex()),
    }


@pytest.mark.parametrize("what", ["its key", "its salt", "everything", "another key", "another salt"])
async def test_what_is_stored_is_dropped_and_its_export_stays(bench: Bench, what: str) -> None:
    media = png(new_picture(32, 32))
    ready = await bench.call(media, salt="one")
    report = await bench.worker.drop(drops(bench, media)[what])
    concerned = "another" not in what
    assert (report.entries, report.nbytes) == ((1, ready.nbytes) if concerned else (0, 0))
    assert bench.manager.peek(ready.key) != concerned
    assert bench.exporter.statistics().held == 1
    assert bench.exporter.release(ready.token)
    assert bench.manager.statistics().arena.used_bytes == (0 if concerned else ready.nbytes)


@pytest.mark.parametrize("what", ["its key", "its salt", "everything", "another key", "another salt"])
async def test_what_is_being_encoded_when_it_is_dropped_is_delivered_and_not_stored(
    bench: Bench, what: str
) -> None:
    media = png(new_picture(32, 32))
    bench.encoder.open.clear()
    call = asyncio.create_task(bench.call(media, salt="one"))
    assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
    assert (await bench.worker.drop(drops(bench, media)[what])).entries == 0
    bench.encoder.open.set()
    ready = await call
    assert ready.origin == "encoded"
    assert bench.manager.peek(ready.key) == ("another" in what)
    assert (await bench.call(media, salt="one")).origin == ("cached" if "another" in what else "encoded")


async def test_what_was_found_wrong_is_encoded_anew(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    origins = [(await bench.call(media, fresh=fresh)).origin for fresh in (False, True, False)]
    assert origins == ["encoded", "encoded", "cached"]


async def test_more_embeddings_than_the_arena_holds_are_refused_until_one_is_read(bench: Bench) -> None:
    first = await bench.call(png(new_picture(32, 32)))
    room = bench.manager.capacity_bytes // first.nbytes - 1
    for _ in range(room):
        await bench.call(png(new_picture(32, 32)))
    with pytest.raises(EncodeOverloadedError, match="waiting for a PD worker's READ"):
        await bench.call(png(new_picture(32, 32)))
    assert bench.exporter.release(first.token)
    assert (await bench.call(png(new_picture(32, 32)))).origin == "encoded"


async def test_a_full_queue_refuses_and_what_is_stored_is_still_offered(bench: Bench) -> None:
    stored = png(new_picture(32, 32))
    await bench.call(stored)
    bench.worker._queue._max_items = 0  # 256 by default
    with pytest.raises(EncodeOverloadedError, match="vision tower"):
        await bench.call(png(new_picture(32, 32)))
    assert (await bench.call(stored)).origin == "cached"


async def test_an_answer_that_comes_when_the_caller_has_gone_exports_nothing(bench: Bench) -> None:
    media = png(new_picture(32, 32))
    assert bench.exporter.release((await bench.call(media)).token)
    request = EncodeRequest(fingerprint=bench.fingerprint, key=bench.key(media), media=media)
    context = Context("gone")
    context.stop_generating()
    assert [answer async for answer in bench.worker.handle(request.model_dump(), context)] == []
    assert bench.exporter.statistics().held == 0
