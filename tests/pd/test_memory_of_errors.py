"""A failed request keeps none of its bytes: not until the garbage collector runs, and not at all.

Each failure is met several times with files of several MiB and the collector switched off; what Python has
allocated afterwards must be what it had before.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pybase64
import pytest

from tests.e2e.stack import new_image, png
from tests.encode.bench import Caller
from tests.pd.bench import ROWS, WIDTH, Bench, admit_all, image_url, pd_settings
from tests.pd.test_answer import PeerGenerator, request
from trtllm_mm_cache.errors import (
    EncodeFailedError,
    EncodeUnavailableError,
    InvalidImageError,
)
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.settings import PdSettings

FILE_BYTES = 4 * 1024**2
ROUNDS = 4
HEAD = png(new_image(32, 32))


@pytest.fixture
def settings() -> PdSettings:
    return pd_settings(max_waiting_image_mb=64, encode_timeout_s=0.2)


@pytest.fixture
def traced() -> Iterator[None]:
    logging.disable()  # pytest keeps every record with its traceback, to show them
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()
    logging.disable(logging.NOTSET)


def large_url(number: int, body: bytes | None = None) -> str:
    """An image file of `FILE_BYTES`; the encode worker of these tests does not decode it."""
    start = body if body is not None else png(new_image(32, 32))
    file = start + number.to_bytes(4, "big") + bytes(FILE_BYTES - len(start) - 4)
    return "data:image/png;base64," + pybase64.b64encode(file).decode()


async def fail(worker: PdWorker, *references: str) -> None:
    *_, last = [output async for output in worker.handle(request(*references), Caller())]
    assert "error" in last, "the request was served"


async def down_to(nbytes: int) -> None:
    """Wait for a thread that is about to drop its last variable; the collector does not run."""
    try:
        async with asyncio.timeout(10):
            while tracemalloc.get_traced_memory()[0] > nbytes:
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"{tracemalloc.get_traced_memory()[0]} bytes are alive, {nbytes} at most were expected")


def spoil(bench: Bench, generator: PeerGenerator, kind: str) -> None:
    wrong: dict[str, Any] = {
        "refused": InvalidImageError("truncated"),
        "unavailable": EncodeUnavailableError("gone"),
        "tower": EncodeFailedError("the vision tower failed"),
        "rows": lambda answer: answer | {"shape": (ROWS + 1, WIDTH)},
        "checksum": lambda answer: answer | {"checksum": answer["checksum"] ^ 1},
        "address": lambda answer: answer | {"address": 4096},
        "metadata": lambda answer: answer | {"peer": {}},
    }
    if kind in wrong:
        bench.peer.changes = [wrong[kind]] * 2
    elif kind == "nan":
        bench.peer.spoil = float("nan")
    elif kind == "silent":
        bench.peer.gate.clear()
    elif kind == "engine":
        generator.failure = RuntimeError("CUDA error")


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "kind",
    [
        "refused",
        "unavailable",
        "silent",
        "tower",
        "rows",
        "checksum",
        "address",
        "metadata",
        "nan",
        "engine",
        "second",
    ],
)
async def test_a_failed_request_keeps_no_bytes(bench: Bench, kind: str) -> None:
    generator = PeerGenerator()
    worker = PdWorker(generator, bench.resolver, bench.metrics, pd_settings(), admit_all)

    async def rounds(first: int, count: int) -> None:
        for number in range(first, first + count):
            spoil(bench, generator, kind)
            references = [large_url(number)]
            if kind == "second":  # the first is on its way when the second turns out to be none
                references.append("gopher://x")
            await fail(worker, *references)
        bench.cache.clear()

    await rounds(0, 1)
    gc.collect()
    warm = tracemalloc.get_traced_memory()[0]
    await rounds(1, ROUNDS)
    await down_to(warm + FILE_BYTES // 2)


@pytest.mark.usefixtures("traced")
async def test_a_request_that_is_cancelled_keeps_no_bytes(bench: Bench) -> None:
    worker = PdWorker(PeerGenerator(), bench.resolver, bench.metrics, pd_settings(), admit_all)
    bench.peer.gate.clear()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(ROUNDS):
        calls = len(bench.peer.calls)
        answer = worker.handle(request(large_url(number)), Caller())
        reading = asyncio.ensure_future(anext(answer))
        while len(bench.peer.calls) == calls:
            await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.wait({reading})
        await answer.aclose()
        del answer, reading
    await bench.nothing_held()
    async with asyncio.timeout(10):
        while bench.tiers.flights.in_flight or bench.resolver.waiting.items:
            await asyncio.sleep(0.001)
    await down_to(before + FILE_BYTES // 2)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("inline", ["url", "bytes"])
async def test_a_request_that_generates_keeps_no_bytes_of_its_images(bench: Bench, inline: str) -> None:
    """A miss and then a hit for each file; the engine stands still after their first tokens."""
    generator = PeerGenerator()
    generator.stalls_after = 1
    worker = PdWorker(generator, bench.resolver, bench.metrics, pd_settings(), admit_all)
    answers = []
    before = tracemalloc.get_traced_memory()[0]
    for number in (1, 1, 2, 2):
        payload = request(large_url(number, HEAD))
        if inline == "bytes":
            (part,) = payload["multi_modal_data"]["image_url"]
            part["Bytes"] = pybase64.b64decode(part.pop("Url").partition(",")[2])
            del part
        answers.append(worker.handle(payload, Caller()))
        del payload
        await anext(answers[-1])
    assert bench.resolver.incoming.nbytes == bench.resolver.waiting.nbytes == 0
    await down_to(before + FILE_BYTES // 2)
    for answer in answers:
        await answer.aclose()
    await bench.nothing_held()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("settings", [pd_settings(max_waiting_image_mb=1.5 * FILE_BYTES / 1024**2)])
async def test_those_that_join_a_flight_hold_no_bytes_and_are_not_charged(bench: Bench) -> None:
    """The bound admits one such file; each of these requests brings its own copy of it."""
    bench.peer.gate.clear()
    body, callers = png(new_image(32, 32)), 16
    before = tracemalloc.get_traced_memory()[0]
    resolving = [asyncio.create_task(bench.resolve([large_url(7, body)])) for _ in range(callers)]
    async with asyncio.timeout(60):
        while bench.tiers.flights.waiters < callers:
            await asyncio.sleep(0.001)
    assert bench.resolver.waiting.nbytes == FILE_BYTES
    held = tracemalloc.get_traced_memory()[0] - before
    text = callers * FILE_BYTES * 4 // 3  # the references are their requests' own
    assert held - text < 3 * FILE_BYTES
    bench.peer.gate.set()
    for images in await asyncio.gather(*resolving):
        images.release()
    assert bench.resolver.waiting.refused == 0
    (await bench.resolve([image_url()])).release()
