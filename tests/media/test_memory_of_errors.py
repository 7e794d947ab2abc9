"""What is refused keeps none of its bytes: each failure is met several times, the cyclic collector off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.media.conftest import limited, nothing_kept
from tests.media.images import LIMITS, noise, png, png_chunk, saved
from tests.media.origin import Asked, Origin, answer
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import MediaSource, decode_image, probe_image
from trtllm_mm_cache.settings import MB, ImageLimits

ROUNDS = 4
SIDE = 1200

BROKEN = {
    "PNG": saved(noise(size=(SIDE, SIDE)), "PNG"),
    "JPEG": saved(noise(size=(2 * SIDE, 2 * SIDE)), "JPEG", quality=95),
    "WEBP": saved(noise("RGBA", (SIDE, SIDE)), "WEBP", lossless=True, method=0),
    "GIF": saved(noise("P", (2 * SIDE, SIDE)), "GIF"),
    "BMP": saved(noise(size=(SIDE, SIDE)), "BMP"),
    "TIFF": saved(noise(size=(SIDE, SIDE)), "TIFF"),
}
REFUSED: dict[str, tuple[bytes, ImageLimits]] = {
    "a header, then nothing that is one": (png(9, 9, png_chunk(b"IDAT", bytes(2 * MB))), LIMITS),
    "no image": (b"no image" * (MB // 4), LIMITS),
    "too many pixels": (BROKEN["PNG"], ImageLimits(max_image_megapixels=0.1)),
    "too many bytes": (BROKEN["PNG"], ImageLimits(max_file_size_mb=1)),
    **{f"{name}, cut off": (data[: len(data) * 9 // 10], LIMITS) for name, data in BROKEN.items()},
}


def refuse(read: Callable[[bytes, ImageLimits], object], data: bytes, limits: ImageLimits) -> None:
    with pytest.raises(MmCacheError):
        read(data, limits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_image_keeps_no_bytes(traced: Callable[[], int], name: str) -> None:
    data, limits = REFUSED[name]
    assert len(data) > MB
    refuse(decode_image, data + bytes(1), limits)
    before = traced()
    for number in range(ROUNDS):
        # Files of their own: a decoder that is kept keeps the one that it reads from.
        refuse(decode_image, data + bytes(number + 2), limits)
        if limits is not LIMITS:
            refuse(probe_image, data + bytes(number + 2), limits)
    assert traced() - before < len(data) // 2


BODY = bytes(4 * MB)


async def broken_off(asked: Asked, writer: asyncio.StreamWriter) -> None:
    answer(writer, "200 OK", {"Content-Length": str(len(BODY)), "Cache-Control": "max-age=60"}, BODY[:-1])
    await writer.drain()
    writer.close()


async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            writer.write(BODY)
            await writer.drain()
    except ConnectionError:
        pass


async def dripping(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
    while True:
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"X")


async def in_vain(fetch: Coroutine[Any, Any, object], why: str) -> None:
    """In a task, as for a request: the task leads to its error, and must not be led to by that."""
    with pytest.raises(MmCacheError, match=why):
        await asyncio.create_task(fetch)
    await asyncio.sleep(0)  # the event loop refers to what it runs until the next turn


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "broke off"),
        ("endless", "more than the limit"),
        ("dripping", "within 0.5 seconds"),
        ("data", "not valid base64"),
        ("data, too large", "more than the limit"),
    ],
)
async def test_a_reference_that_fails_keeps_no_bytes(
    traced: Callable[[], int], origin: Origin, name: str, why: str
) -> None:
    origin.routes.update({"/broken": broken_off, "/endless": endless, "/dripping": dripping})
    references = {
        "broken": origin.url("/broken"),
        "endless": origin.url("/endless"),
        "dripping": origin.url("/dripping"),
        "data": "data:;base64,!" + "A" * len(BODY),
        "data, too large": "data:," + "A" * (2 * len(BODY) + 1),
    }
    timeout_s = 0.5 if name == "dripping" else 30
    async with limited(max_file_bytes=2 * len(BODY), media_timeout_s=timeout_s) as source:
        before = traced()
        for _ in range(ROUNDS):
            await in_vain(source.fetch(references[name], Scope()), why)
        await origin.until_open(0)
        await nothing_kept(traced, before, len(BODY))


async def test_a_server_out_of_reach_leaves_no_cycle(traced: Callable[[], int], origin: Origin) -> None:
    """What waits for the fetch may hold megabytes; an exception that leads to itself would keep them."""

    async def request(source: MediaSource, reference: str) -> None:
        held = bytearray(MB)
        await source.fetch(reference, Scope())
        held.clear()

    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    reference = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    server.close()
    await server.wait_closed()
    async with limited() as source:
        before = traced()
        for _ in range(ROUNDS):
            await in_vain(request(source, reference), "cannot be reached")
        await nothing_kept(traced, before, MB)
