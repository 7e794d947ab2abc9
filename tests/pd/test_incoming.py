"""Images on their way in: their bytes are bounded, and what is large keeps out nothing else."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.e2e.stack import data_url, new_image, png
from tests.media.origin import Resource, serving
from tests.pd.bench import Bench, image_url, pd_settings
from trtllm_mm_cache.errors import MediaTooLargeError, OverloadedError
from trtllm_mm_cache.media import ImageInfo, probe_image
from trtllm_mm_cache.pd.fetch import OFF_LOOP_BYTES
from trtllm_mm_cache.settings import ImageLimits, MediaSettings


def large_url(number: int) -> str:
    """An image file of 96 KiB; the peer does not decode it."""
    start = png(new_image(32, 32))
    return data_url(start + number.to_bytes(4, "big") + bytes(96 * 1024 - len(start) - 4))


INCOMING = pd_settings(
    max_incoming_image_mb=576 / 1024,
    max_waiting_image_mb=1,
    media=MediaSettings(allow_private_addresses=True, media_timeout_s=5),
)


@pytest.mark.parametrize("settings", [INCOMING])
async def test_large_images_on_their_way_in_keep_neither_text_nor_small_ones_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = image_url()
    assert len(small) < 576 * 1024 / 256
    (await bench.resolve([small])).release()
    open_gate = threading.Event()

    def held(data: bytes, limits: ImageLimits) -> ImageInfo:
        if len(data) > OFF_LOOP_BYTES:
            assert open_gate.wait(30)
        return probe_image(data, limits)

    monkeypatch.setattr("trtllm_mm_cache.pd.fetch.probe_image", held)
    large = [asyncio.create_task(bench.resolve([large_url(number)])) for number in range(3)]
    async with asyncio.timeout(30):
        while bench.resolver.incoming.items < 3:
            await asyncio.sleep(0.001)
    with pytest.raises(OverloadedError, match="max-incoming-image-mb"):
        await bench.resolve([large_url(3)])
    (await bench.resolve([])).release()
    again = await bench.resolve([small])
    assert again.hits == 1
    again.release()
    open_gate.set()
    for images in await asyncio.gather(*large):
        images.release()
    assert (bench.resolver.incoming.nbytes, bench.resolver.incoming.refused) == (0, 1)


@pytest.mark.parametrize("settings", [INCOMING])
async def test_a_request_that_can_never_come_in_is_a_mistake_of_the_clients(bench: Bench) -> None:
    with pytest.raises(MediaTooLargeError, match=r"0\.5625 MB \(--max-incoming-image-mb\)"):
        await bench.resolve([large_url(number) for number in range(5)])
    same = large_url(0)
    with pytest.raises(MediaTooLargeError):
        await bench.resolve([same] * 5)
    (await bench.resolve([same] * 3)).release()


@pytest.mark.parametrize("settings", [INCOMING])
async def test_what_is_fetched_counts_as_it_arrives(bench: Bench) -> None:
    file = png(new_image(32, 32))
    async with serving() as origin:
        origin.routes["/large"] = Resource(file + bytes(600 * 1024))
        origin.routes["/small"] = Resource(file)
        with pytest.raises(MediaTooLargeError, match="max-incoming-image-mb"):
            await bench.resolve([origin.url("/large")])
        (await bench.resolve([origin.url("/small")])).release()
    assert (bench.resolver.incoming.nbytes, bench.resolver.incoming.items) == (0, 0)
