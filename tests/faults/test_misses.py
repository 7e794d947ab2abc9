"""The flow of a miss when encode workers keep failing, freeze, or send what must not be used.

Real parts and real NIXL between two agents; the peer encode workers stand on `EncodeClient`'s interface.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from PIL import Image

from tests.e2e.stack import data_url, png
from tests.pd.bench import (
    BREAKER_FAILURES,
    BREAKER_RETRY_S,
    MAX_WAITING_BYTES,
    ROWS,
    WIDTH,
    Bench,
    assert_holds,
    image_url,
    pd_settings,
)
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EmbeddingMismatchError,
    EncodeUnavailableError,
    InvalidEmbeddingError,
    MmCacheError,
    OverloadedError,
)

_noise = random.Random(5)


def noise() -> str:
    """Return a picture whose file is larger than the bound on waiting images, so it is served alone."""
    side = int((MAX_WAITING_BYTES / 3) ** 0.5) + 8
    return data_url(png(Image.frombytes("RGB", (side, side), _noise.randbytes(3 * side * side))))


async def test_an_instance_that_keeps_failing_is_passed_over_then_probed_then_used_again(
    bench: Bench,
) -> None:
    gone = EncodeUnavailableError("gone")
    bench.peer.fail = {1: gone}
    for _ in range(BREAKER_FAILURES):
        (await bench.resolve([image_url()])).release()
    assert bench.peer.calls == [1, 2] * BREAKER_FAILURES

    bench.peer.calls.clear()
    (await bench.resolve([image_url()])).release()
    assert bench.peer.calls == [2], "an open breaker means that the next one is asked at once"
    assert bench.tier.breakers.states() == {1: "open", 2: "closed"}

    bench.clock.now += BREAKER_RETRY_S
    bench.peer.calls.clear()
    for _ in range(2):
        (await bench.resolve([image_url()])).release()
    assert bench.peer.calls == [1, 2, 2], "one probe"

    bench.clock.now += BREAKER_RETRY_S
    bench.peer.fail = {}
    bench.peer.calls.clear()
    for _ in range(2):
        (await bench.resolve([image_url()])).release()
    assert bench.peer.calls == [1, 1]


async def test_with_every_breaker_open_a_miss_fails_at_once_and_a_hit_is_served(bench: Bench) -> None:
    cached = image_url()
    (await bench.resolve([cached])).release()
    gone = EncodeUnavailableError("gone")
    bench.peer.fail = {1: gone, 2: gone}
    for _ in range(BREAKER_FAILURES):
        with pytest.raises(EncodeUnavailableError, match="gone"):
            await bench.resolve([image_url()])
    bench.peer.calls.clear()
    with pytest.raises(EncodeUnavailableError, match="passed over"):
        await bench.resolve([image_url()])
    assert bench.peer.calls == []
    (await bench.resolve([cached])).release()
    bench.peer.instances = [3]
    (await bench.resolve([image_url()])).release()
    assert bench.peer.calls == [3], "a new instance begins closed"


async def test_an_export_that_will_not_be_read_is_released_at_once(bench: Bench) -> None:
    bench.peer.changes = [lambda answer: answer | {"shape": (ROWS + 1, WIDTH)}] * 2
    with pytest.raises(EmbeddingMismatchError):
        await bench.resolve([image_url()])
    held = [await bench.resolve([image_url()]) for _ in range(6)]  # both arenas are full of leased entries
    with pytest.raises(ArenaFullError):
        await bench.resolve([image_url()])
    async with asyncio.timeout(5):
        while bench.peer.exporter.held:
            await asyncio.sleep(0.001)
    exporter = bench.peer.exporter
    assert (exporter.acked, exporter.released, exporter.timed_out) == (6, 3, 0)
    for images in held:
        images.release()


@pytest.mark.parametrize("settings", [pd_settings(encode_timeout_s=1)])
async def test_a_frozen_instance_costs_half_of_the_deadline_and_the_next_one_serves(bench: Bench) -> None:
    bench.peer.frozen = {1}
    images = await bench.resolve([image_url()])
    assert_holds(images.leases[0])
    assert bench.peer.calls == [1, 2]
    images.release()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_an_embedding_with_nan_or_infinity_is_refused_and_never_cached(
    bench: Bench, value: float
) -> None:
    bench.peer.spoil = value
    with pytest.raises(InvalidEmbeddingError, match=r"image 1: .* NaN") as caught:
        await bench.resolve([image_url()])
    assert caught.value.http_status == 502
    assert bench.peer.calls == [1, 2]
    assert bench.cache.keys() == []
    assert bench.reader.not_finite == 2


@pytest.mark.parametrize("fault", ["nan", "rows"])
async def test_one_clients_bad_embeddings_do_not_shut_out_another_client(bench: Bench, fault: str) -> None:
    """With one encode worker: however many of one client's images fail in the tower, others are served."""
    bench.peer.instances = [1]
    for _ in range(2 * BREAKER_FAILURES):
        if fault == "nan":
            bench.peer.spoil = float("nan")
        else:
            bench.peer.changes = [lambda answer: answer | {"shape": (ROWS + 1, WIDTH)}] * 2
        with pytest.raises(MmCacheError):
            await bench.resolve([image_url()])
    bench.peer.spoil = None
    assert bench.tier.breakers.states() == {1: "closed"}
    (await bench.resolve([image_url()])).release()


async def test_misses_beyond_the_bound_are_refused_while_hits_are_served(bench: Bench) -> None:
    cached = image_url()
    (await bench.resolve([cached])).release()
    large = [noise(), noise()]
    bench.peer.gate.clear()
    first = asyncio.create_task(bench.resolve([large[0]]))
    while bench.resolver.waiting.items == 0:
        await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="image 1"):
        await bench.resolve([large[1]])
    (await bench.resolve([cached])).release()
    bench.peer.gate.set()
    (await first).release()
    (await bench.resolve([large[1]])).release()
    assert bench.resolver.waiting.refused == 1
