"""The memory that bodies take together: whose turn it is, what is refused, and what a parse costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from starlette.requests import Request

from trtllm_mm_cache.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    OverloadedError,
    RequestTimeoutError,
)
from trtllm_mm_cache.frontend.body import BodyMemory, announced_bytes, receive_body
from trtllm_mm_cache.settings import MB, FrontendSettings

LARGE = MB  # counts three times
DEADLINE_S = 20


def settings(**changes: float) -> FrontendSettings:
    return FrontendSettings(model_path="m", **{"request_memory_mb": 12, "max_request_mb": 4} | changes)


def request(headers: dict[str, str], *chunks: bytes | float) -> Request:
    """Return a request whose body comes in these chunks; a number is seconds, below zero: for ever."""

    async def come() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, bytes):
                yield chunk
            else:
                await asyncio.sleep(chunk if chunk >= 0 else 3600)

    coming = come()

    async def receive() -> dict[str, object]:
        body = await anext(coming, None)
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": encoded}, receive)


JSON = {"content-type": "application/json"}


async def turns(memory: BodyMemory, *sizes: int) -> list[int]:
    """Let bodies of these sizes come one after the other; return the order in which they got their memory."""
    order: list[int] = []

    async def body(index: int, size: int) -> None:
        async with memory.hold(size):
            order.append(index)
            await asyncio.sleep(0)

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for index, size in enumerate(sizes):
            group.create_task(body(index, size))
            await asyncio.sleep(0)
    return order


async def test_bodies_are_within_the_memory_at_any_time() -> None:
    memory = BodyMemory(settings())
    most = 0

    async def body(size: int) -> None:
        nonlocal most
        async with memory.hold(size):
            most = max(most, memory.held_bytes)
            await asyncio.sleep(0)

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(body(LARGE // 2 + number * 20_000))
    assert 6 * MB < most <= 9 * MB  # a quarter is left to small ones
    assert (memory.held_bytes, memory.waiting, memory.refused) == (0, 0, 0)


async def test_a_large_body_is_not_overtaken_by_others_that_would_fit() -> None:
    memory = BodyMemory(settings())
    async with memory.hold(LARGE), AsyncExitStack() as stack:
        # 9 MB are free. The second takes all of 12, the third would fit beside the first.
        waiting = asyncio.create_task(turns(memory, 4 * LARGE, LARGE))
        await asyncio.sleep(0.05)
        assert memory.waiting == 2
        await stack.enter_async_context(memory.hold(1))  # a small one does not wait
    assert await waiting == [0, 1]


async def test_a_body_larger_than_the_memory_is_taken_alone_beside_small_ones() -> None:
    memory = BodyMemory(settings(request_memory_mb=1))
    async with memory.hold(1000), memory.hold(2 * LARGE):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), memory.hold(LARGE):
                pytest.fail("beside it there is no memory")
        async with memory.hold(1000):
            assert memory.waiting == 0
    async with memory.hold(LARGE):
        pass


async def test_a_turn_that_does_not_come_is_a_refusal_that_may_be_retried() -> None:
    memory = BodyMemory(settings(max_waiting_s=0.05))
    async with memory.hold(4 * LARGE):
        with pytest.raises(OverloadedError, match="small ones are still served"):
            async with memory.hold(LARGE):
                pytest.fail("there is no memory")
    assert (memory.refused, memory.waiting, memory.held_bytes) == (1, 0, 0)
    async with memory.hold(LARGE):  # the one that left is in nobody's way
        pass


async def test_small_bodies_are_refused_when_they_alone_have_taken_their_quarter() -> None:
    memory, small = BodyMemory(settings()), 64 * 1024
    async with AsyncExitStack() as stack:
        for _ in range(16):  # 3 MB, each counted three times
            await stack.enter_async_context(memory.hold(small))
        with pytest.raises(OverloadedError, match="retry"):
            async with memory.hold(1):
                pytest.fail("small ones have no memory left")
        async with memory.hold(LARGE):
            assert memory.held_bytes == 6 * MB
    async with memory.hold(small):
        assert (memory.refused, memory.waiting, memory.held_bytes) == (1, 0, 3 * small)


async def test_one_that_leaves_while_it_waits_frees_its_place() -> None:
    memory = BodyMemory(settings())
    async with memory.hold(LARGE):
        leaving = asyncio.create_task(turns(memory, 4 * LARGE))
        await asyncio.sleep(0)
        after = asyncio.create_task(turns(memory, LARGE))
        await asyncio.sleep(0.05)
        assert not after.done()
        leaving.cancel()
        async with asyncio.timeout(DEADLINE_S):
            assert await after == [0]
    assert memory.held_bytes == memory.waiting == 0


async def test_a_share_released_early_lets_the_next_one_in() -> None:
    memory = BodyMemory(settings())
    async with memory.hold(4 * LARGE) as share:
        waiting = asyncio.create_task(turns(memory, 4 * LARGE))
        await asyncio.sleep(0)
        share.release()
        share.release()
        async with asyncio.timeout(DEADLINE_S):
            assert await waiting == [0]
    assert memory.held_bytes == 0


async def test_a_failure_releases_what_was_held() -> None:
    memory = BodyMemory(settings())
    with pytest.raises(ZeroDivisionError):
        async with memory.hold(LARGE):
            raise ZeroDivisionError
    assert memory.held_bytes == 0


@pytest.mark.parametrize(
    "headers",
    [
        JSON | {"content-length": "17"},
        {"content-type": "Application/JSON; charset=utf-8", "content-length": "17"},
        JSON | {"content-length": "17", "content-encoding": "identity"},
    ],
)
def test_a_body_counts_what_its_header_says(headers: dict[str, str]) -> None:
    assert announced_bytes(request(headers), settings()) == 17


@pytest.mark.parametrize("length", [None, "", "-1", "+5", "1e3", "\xb2", "0x10", "5, 5"])
def test_a_body_without_a_length_counts_as_the_largest(length: str | None) -> None:
    headers = JSON | ({} if length is None else {"content-length": length})
    assert announced_bytes(request(headers), settings()) == 4 * MB


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "Content-Type: application/json"),
        ({"content-type": "text/plain"}, "Content-Type: application/json"),
        ({"content-type": "multipart/form-data; boundary=x"}, "Content-Type: application/json"),
        (JSON | {"content-encoding": "gzip"}, "compressed"),
        (JSON | {"content-encoding": "br"}, "compressed"),
    ],
)
def test_another_kind_of_body_is_refused(headers: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        announced_bytes(request(headers), settings())


def test_a_length_above_the_limit_is_refused_before_anything_is_received() -> None:
    with pytest.raises(MediaTooLargeError, match=r"larger than 4 MB \(--max-request-mb\)"):
        announced_bytes(request(JSON | {"content-length": str(4 * MB + 1)}), settings())


async def test_a_body_in_chunks_is_received_whole() -> None:
    asked = request(JSON, b"ab", b"c", b"", b"def")
    assert await receive_body(asked, settings()) == b"abcdef"


async def test_chunks_beyond_the_limit_are_not_received() -> None:
    with pytest.raises(MediaTooLargeError):
        await receive_body(request(JSON, *[bytes(MB)] * 5, -1.0), settings())


async def test_a_body_that_does_not_come_is_a_408() -> None:
    with pytest.raises(RequestTimeoutError, match="2 bytes have arrived"):
        await receive_body(request(JSON, b'{"', -1.0), settings(body_timeout_s=0.05))


async def test_a_body_that_trickles_in_ends_long_before_the_longest_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trtllm_mm_cache.frontend.body._GRACE_S", 0.1)
    trickle = [each for _ in range(400) for each in (b"x", 0.01)]
    with pytest.raises(RequestTimeoutError):
        await receive_body(request(JSON, *trickle), settings(body_timeout_s=3600))
    quick = [each for _ in range(30) for each in (bytes(MB // 16), 0.01)]
    assert len(await receive_body(request(JSON, *quick), settings(body_timeout_s=3600))) == 30 * MB // 16


PARSE = """
import asyncio, json, resource, sys
from trtllm_mm_cache.frontend.body import parse_body
parts = {
    "one data: URL": lambda n: image("data:image/png;base64," + "A" * n),
    "many data: URLs": lambda n: ",".join([image("data:image/png;base64," + "A" * (n // 1000))] * 1000),
    "escaped slashes": lambda n: image("data:image/png;base64," + "A\\\\/" * (n // 3)),
    "other escapes": lambda n: image("data:image/png;base64," + "\\\\u0041" * (n // 6)),
    "text beyond ASCII": lambda n: image("data:image/png;base64," + "é" * (n // 2)),
    "openings": lambda n: image('\\\\"data:' * (n // 7)),
    "lists": lambda n: "[" * n,
}
def image(url):
    return '{"type":"image_url","image_url":{"url":"' + url + '"}}'
async def main():
    size = 100 * 1024**2
    raw = bytearray(('{"messages":[{"role":"user","content":[' + parts[sys.argv[1]](size) + ']}]}').encode())
    resource.setrlimit(resource.RLIMIT_AS, (6 * 1024**3, 6 * 1024**3))
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = status("VmRSS")
    try:
        body = await parse_body(raw)
    except Exception as error:
        print(type(error).__name__, end=" ")
    print(len(raw), status("VmHWM") - before)
def status(name):
    return int(open("/proc/self/status").read().partition(name + ":")[2].split()[0]) * 1024
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("one data: URL", []),
        ("many data: URLs", []),
        ("escaped slashes", []),
        ("other escapes", ["InvalidRequestError"]),
        ("text beyond ASCII", ["InvalidRequestError"]),
        ("openings", ["InvalidRequestError"]),
        ("lists", ["InvalidRequestError"]),
    ],
)
def test_reading_100_mb_takes_no_more_than_it_counts_for(kind: str, outcome: list[str]) -> None:
    """A body counts three times; itself it is there already. 4 MB for what Python has around it."""
    ran = subprocess.run(
        [sys.executable, "-c", PARSE, kind], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    *said, left, growth = ran.stdout.split()
    assert said == outcome
    assert int(left) == 0
    assert int(growth) <= (2 * 100 + 4) * MB
