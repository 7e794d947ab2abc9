"""A call that fails keeps none of its bytes: not until the cyclic collector runs, and not at all.

Each failure is met several times with files of several MiB and the collector switched off; what Python has
allocated afterwards must be what it had before. Calls are tasks, as in a worker: a task leads to its error.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from tests.encode.bench import Bench, Caller, only, running
from tests.media.conftest import nothing_kept
from tests.media.images import noise, png, png_chunk, saved
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.batcher import MicroBatcher
from trtllm_mm_cache.encode.maker import EncodeJob
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersVisionEncoder
from trtllm_mm_cache.errors import EncodeFailedError, EncodeOverloadedError, MmCacheError
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.settings import MB, ImageLimits

FILE_BYTES = 4 * MB
ROUNDS = 4
HONEST = saved(noise(size=(32, 32)), "PNG")
BROKEN = png(32, 32, png_chunk(b"IDAT", b"garbage"))


@pytest.fixture(autouse=True)
def no_records(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps the records of a test, and with them the exceptions that were logged."""
    caplog.set_level("CRITICAL", "trtllm_mm_cache")


def large(start: bytes, number: int) -> bytes:
    """A file of its own of `FILE_BYTES`: what is behind an image's end is not decoded."""
    return start + number.to_bytes(4, "big") + bytes(FILE_BYTES - len(start) - 4)


def untouched(bench: Bench) -> None:
    """Spoil nothing: the file itself is what is wrong."""


def fail_to_prepare(bench: Bench) -> None:
    def prepare(item: EncodeItem) -> Any:
        raise RuntimeError("cannot reshape")

    bench.encoder.preprocess = prepare  # type: ignore[method-assign]


def fail_to_encode(bench: Bench) -> None:
    bench.encoder.fails = lambda: RuntimeError("CUDA out of memory")


def raise_ours(bench: Bench) -> None:
    bench.encoder.fails = lambda: EncodeFailedError("no")


FAILURES: dict[str, tuple[bytes, Callable[[Bench], None], dict[str, Any], str]] = {
    "broken": (BROKEN, untouched, {}, "invalid_image"),
    "no image": (b"no image", untouched, {}, "unsupported_media"),
    "too many bytes": (HONEST, untouched, {"images": ImageLimits(max_file_size_mb=1)}, "media_too_large"),
    "too many pixels": (
        HONEST,
        untouched,
        {"images": ImageLimits(max_image_megapixels=1e-4)},
        "media_too_large",
    ),
    "preprocess": (HONEST, fail_to_prepare, {}, "encode_failed"),
    "tower": (HONEST, fail_to_encode, {}, "encode_failed"),
    "tower, an error of ours": (HONEST, raise_ours, {}, "encode_failed"),
    "an arena too small": (HONEST, untouched, {"capacity_bytes": 64}, "entry_too_large"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("by", ["server", "pipeline"])
async def test_a_call_that_fails_keeps_no_bytes(
    encoder: TransformersVisionEncoder, traced: Callable[[], int], name: str, by: str
) -> None:
    start, spoil, settings, code = FAILURES[name]
    async with running(encoder, **settings) as bench:
        spoil(bench)

        async def call(number: int) -> None:
            media = large(start, number)
            if by == "pipeline":
                await bench.pipeline.encode(EncodeJob(bench.key(media), media, {}, "", Scope()))
            else:
                payload = bench.request(media).model_dump()
                only([answer async for answer in bench.server.handle(payload, Caller())])

        before = traced()
        for number in range(ROUNDS):
            task = asyncio.create_task(call(number))
            await asyncio.wait({task})
            error = task.exception()
            assert isinstance(error, MmCacheError)
            assert error.code == code
            del task, error
        await nothing_kept(traced, before, FILE_BYTES)


async def test_a_call_that_is_refused_keeps_no_bytes(
    encoder: TransformersVisionEncoder, traced: Callable[[], int]
) -> None:
    async with running(encoder, max_queued=1) as bench:

        async def call(media: bytes) -> EncodeReady:
            payload = bench.request(media).model_dump()
            return only([answer async for answer in bench.server.handle(payload, Caller())])

        bench.encoder.open.clear()
        first = asyncio.create_task(call(HONEST))
        assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
        before = traced()
        for number in range(ROUNDS):
            refused = asyncio.create_task(call(large(HONEST, number)))
            await asyncio.wait({refused})
            assert isinstance(refused.exception(), EncodeOverloadedError)
            del refused
        await nothing_kept(traced, before, FILE_BYTES)
        bench.encoder.open.set()
        await first


@pytest.mark.parametrize("how", ["stopped", "cancelled"])
async def test_a_call_without_a_caller_keeps_no_bytes_while_the_tower_runs(
    bench: Bench, traced: Callable[[], int], how: str
) -> None:
    """One is in the tower, which cannot be stopped; the others wait for it."""
    bench.encoder.open.clear()

    async def answers(number: int, context: Caller) -> list[Any]:
        payload = bench.request(large(HONEST, number)).model_dump()
        return [each async for each in bench.server.handle(payload, context)]

    before = traced()
    for number in range(ROUNDS):
        context = Caller()
        call = asyncio.create_task(answers(number, context))
        async with asyncio.timeout(30):
            while bench.pipeline.maker.batcher.queued == 0 and not bench.encoder.reached.is_set():
                await asyncio.sleep(0.001)
        if how == "stopped":
            context.stop()
            assert await call == []
        else:
            call.cancel()
            await asyncio.wait({call})
        bench.encoder.reached.clear()
        del call, context
    await nothing_kept(traced, before, FILE_BYTES)
    assert bench.pipeline.maker.batcher.queued == 0


async def test_a_call_in_the_tower_holds_no_file(bench: Bench, traced: Callable[[], int]) -> None:
    bench.encoder.open.clear()

    async def call() -> str:
        payload = bench.request(large(HONEST, 0)).model_dump()
        return only([answer async for answer in bench.server.handle(payload, Caller())]).origin

    before = traced()
    waiting = asyncio.create_task(call())
    assert await asyncio.to_thread(bench.encoder.reached.wait, 30)
    await nothing_kept(traced, before, FILE_BYTES)
    bench.encoder.open.set()
    assert await waiting == "encoded"


async def test_those_that_join_a_flight_hold_no_bytes(bench: Bench, traced: Callable[[], int]) -> None:
    """Each call brings its own copy of the file, as messages of different PD workers do."""
    callers = 8
    bench.encoder.open.clear()
    key = bench.key(large(HONEST, 0))

    def payload() -> dict[str, Any]:
        media = large(HONEST, 0)
        return EncodeRequest(fingerprint=bench.fingerprint, key=key, media=media).model_dump()

    async def call() -> str:
        return only([answer async for answer in bench.server.handle(payload(), Caller())]).origin

    before = traced()
    calls = [asyncio.create_task(call()) for _ in range(callers)]
    async with asyncio.timeout(30):
        while bench.pipeline.flights.waiters < callers or not bench.encoder.reached.is_set():
            await asyncio.sleep(0.001)
    await nothing_kept(traced, before, 3 * FILE_BYTES)
    bench.encoder.open.set()
    assert sorted(await asyncio.gather(*calls)) == ["encoded"] + ["joined"] * (callers - 1)


class Prepared:
    """A tower's input that can be watched."""


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("fails", [False, True])
async def test_an_idle_batcher_keeps_nothing_of_its_last_batch(fails: bool) -> None:
    def encode(batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        if fails:
            raise RuntimeError("CUDA out of memory")
        return [EncodedItem(torch.zeros(1, 1), EmbeddingMetadata()) for _ in batch]

    batcher = MicroBatcher(encode, max_items=4, registry=CollectorRegistry())
    watched = weakref.WeakSet[Prepared]()

    async def submit() -> None:
        prepared = Prepared()
        watched.add(prepared)
        await batcher.submit(prepared)

    await asyncio.gather(*(submit() for _ in range(3)), return_exceptions=True)
    async with asyncio.timeout(30):  # the thread may not have ended its last work yet
        while watched:
            await asyncio.sleep(0.001)
    await batcher.close()
