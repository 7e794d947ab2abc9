"""http(s) references: what is fetched, and what is refused while it arrives."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib

import pytest

from tests.media.conftest import Refused, limited
from tests.media.origin import Asked, Origin, Resource, answer
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import (
    MediaFetchError,
    MediaForbiddenError,
    MediaReferenceError,
    MediaTooLargeError,
)
from trtllm_mm_cache.media import MediaSource

BODY = bytes(range(256)) * 40


async def test_bytes_arrive_unchanged_and_nothing_personal_is_sent(
    origin: Origin, source: MediaSource
) -> None:
    origin.routes["/a"] = Resource(BODY, {"Set-Cookie": "id=1"})
    assert await source.fetch(origin.url("/a?x=%20y#part"), Scope()) == BODY
    assert await source.fetch(origin.url("/a"), Scope()) == BODY
    first, second = origin.asked
    assert first.path == "/a?x=%20y"
    assert set(second.headers) == {"host", "accept", "accept-encoding", "user-agent"}


# Sizes.


async def test_content_coding_is_undone(origin: Origin, source: MediaSource) -> None:
    coded = gzip.compress(BODY)
    origin.routes["/a"] = Resource(coded, {"Content-Encoding": "gzip", "Cache-Control": "max-age=60"})
    assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(2)] == [BODY] * 2
    assert len(origin.asked) == 1


async def test_the_size_limit_is_exact(origin: Origin, refused: Refused) -> None:
    origin.routes["/a"] = Resource(BODY)
    async with limited(max_file_bytes=len(BODY)) as source:
        assert await source.fetch(origin.url("/a"), Scope()) == BODY
    async with limited(max_file_bytes=len(BODY) - 1) as source:
        await refused(source, origin.url("/a"), MediaTooLargeError)


async def test_a_declared_size_is_refused_before_the_body(origin: Origin, refused: Refused) -> None:
    async def announce(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        await writer.drain()
        await origin.closing.wait()

    origin.routes["/a"] = announce
    async with limited(max_file_bytes=1000, media_timeout_s=30) as source:
        started = time.monotonic()
        await refused(source, origin.url("/a"), MediaTooLargeError)
        assert time.monotonic() - started < 10


async def test_an_endless_body_is_cut_off(origin: Origin, refused: Refused) -> None:
    sent = 0

    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nCache-Control: max-age=60\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
            sent += 0x10000

    origin.routes["/a"] = endless
    async with limited(max_file_bytes=1_000_000) as source:
        await refused(source, origin.url("/a"), MediaTooLargeError)
        await origin.until_open(0)
    assert sent < 50_000_000


@pytest.mark.parametrize("codings", ["gzip", "deflate", "gzip, gzip"])
async def test_a_body_that_explodes_is_cut_off(origin: Origin, refused: Refused, codings: str) -> None:
    bomb = bytes(200_000_000)
    for coding in codings.split(", "):
        bomb = gzip.compress(bomb, 1) if coding == "gzip" else zlib.compress(bomb, 1)
    origin.routes["/a"] = Resource(bomb, {"Content-Encoding": codings})
    async with limited(max_file_bytes=2_000_000) as source:
        await refused(source, origin.url("/a"), MediaTooLargeError)


async def test_coded_bytes_that_decode_to_nothing_are_counted(origin: Origin, refused: Refused) -> None:
    empty_block = b"\x00\x00\x00\xff\xff"

    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"a\r\n" + gzip.compress(b"")[:10] + b"\r\n")
        while True:
            writer.write(b"fa00\r\n" + empty_block * 12_800 + b"\r\n")
            await writer.drain()

    origin.routes["/a"] = endless
    async with limited(max_file_bytes=1_000_000) as source:
        await refused(source, origin.url("/a"), MediaTooLargeError)


# Time.


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"]
)
async def test_drip_feeding_ends_at_the_deadline(origin: Origin, refused: Refused, start: bytes) -> None:
    async def drip(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not origin.closing.is_set():
            writer.write(b"X")
            await writer.drain()
            await asyncio.sleep(0.02)

    origin.routes["/a"] = drip
    async with limited(media_timeout_s=0.3) as source:
        started = time.monotonic()
        assert "0.3 seconds" in await refused(source, origin.url("/a"), MediaFetchError)
        assert 0.25 < time.monotonic() - started < 5
        await origin.until_open(0)


async def test_the_deadline_covers_all_redirects(origin: Origin, refused: Refused) -> None:
    async def slow_redirect(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        answer(writer, "302 Found", {"Location": f"/a?{len(origin.asked)}"})

    origin.routes["/a"] = slow_redirect
    async with limited(media_timeout_s=0.4, max_redirects=100) as source:
        await refused(source, origin.url("/a"), MediaFetchError)
    assert len(origin.asked) < 10


async def test_a_cancelled_fetch_leaves_no_connection(origin: Origin, source: MediaSource) -> None:
    async def stall(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nCache-Control: max-age=60\r\n\r\nbegin")
        await writer.drain()
        await origin.closing.wait()

    origin.routes["/a"] = stall
    fetch = asyncio.create_task(source.fetch(origin.url("/a"), Scope()))
    await origin.until_asked(1)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    origin.routes["/a"] = Resource(BODY)
    assert await source.fetch(origin.url("/a"), Scope()) == BODY
    assert len(origin.asked) == 2


async def test_a_response_that_is_refused_gives_its_connection_back(origin: Origin) -> None:
    async def unfinished(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 1000\r\n\r\nbegin")
        await writer.drain()
        await origin.closing.wait()

    origin.routes["/a"], origin.routes["/b"] = unfinished, Resource(BODY)
    async with limited(max_fetches=1, media_timeout_s=5) as source:
        with pytest.raises(MediaFetchError) as kept:  # and with it whatever its traceback refers to
            await source.fetch(origin.url("/a"), Scope())
        assert await source.fetch(origin.url("/b"), Scope()) == BODY
        assert "404" in str(kept.value)


async def test_closing_ends_fetches_that_run(origin: Origin) -> None:
    async def stall(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await origin.closing.wait()

    origin.routes["/a"] = stall
    source = limited()
    fetch = asyncio.create_task(source.fetch(origin.url("/a"), Scope()))
    await origin.until_asked(1)
    await source.close()
    async with asyncio.timeout(5):
        with pytest.raises(MediaFetchError):
            await fetch
    with pytest.raises(MediaFetchError):
        await source.fetch(origin.url("/a"), Scope())


async def test_connections_are_bounded(origin: Origin) -> None:
    running, most, gate = 0, 0, asyncio.Event()

    async def wait(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        answer(writer, "200 OK", {}, asked.path.encode())

    origin.routes["/a"] = wait
    async with limited(max_fetches=3) as source:
        fetches = [
            asyncio.create_task(source.fetch(origin.url(f"/a?{number}"), Scope())) for number in range(12)
        ]
        await origin.until_asked(3)
        gate.set()
        assert await asyncio.gather(*fetches) == [f"/a?{number}".encode() for number in range(12)]
    assert most == 3


# Redirects.


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
async def test_redirects_are_followed(origin: Origin, source: MediaSource, status: str) -> None:
    origin.routes["/a"] = Resource(b"", {"Location": "../b?q=1"}, status=status)
    origin.routes["/b"] = Resource(BODY)
    assert await source.fetch(origin.url("/a"), Scope()) == BODY
    assert [asked.path for asked in origin.asked] == ["/a", "/b?q=1"]


async def test_redirects_are_counted(origin: Origin, refused: Refused) -> None:
    origin.routes["/a"] = Resource(b"", {"Location": "/a"}, status="302 Found")
    async with limited(max_redirects=2) as source:
        assert "2 times" in await refused(source, origin.url("/a"), MediaFetchError)
    assert len(origin.asked) == 3
    async with limited(max_redirects=0) as source:
        await refused(source, origin.url("/a"), MediaFetchError)
    assert len(origin.asked) == 4


@pytest.mark.parametrize(
    ("location", "kind"),
    [
        ("file:///etc/secret", MediaForbiddenError),
        ("ftp://secret.test/a", MediaForbiddenError),
        ("data:image/png;base64,AAAA", MediaForbiddenError),
        ("http://user:secret@127.0.0.1/a", MediaForbiddenError),
        ("http://169.254.169.254/latest", MediaForbiddenError),
        ("//169.254.169.254/latest", MediaForbiddenError),
        ("http://[::ffff:a9fe:a9fe]/", MediaForbiddenError),
        ("http://[", MediaFetchError),
        ("http://a:99999/", MediaForbiddenError),
        ("/" + "a" * 10_000, MediaFetchError),
        ("", MediaFetchError),
    ],
)
async def test_every_hop_is_checked(
    origin: Origin, source: MediaSource, refused: Refused, location: str, kind: type[MediaFetchError]
) -> None:
    origin.routes["/a"] = Resource(b"", {"Location": location}, status="302 Found")
    await refused(source, origin.url("/a"), kind)
    assert len(origin.asked) == 1


# Servers and references that are broken.


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"220 ftp.secret.test ready\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Encoding: gzip\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Encoding: gzip" + b", gzip" * 20 + b"\r\n\r\nhello",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 500 secret stack trace\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_a_server_that_talks_nonsense_is_an_error_of_ours(
    origin: Origin, source: MediaSource, refused: Refused, reply: bytes
) -> None:
    async def say(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        await writer.drain()
        writer.close()

    origin.routes["/a"] = say
    await refused(source, origin.url("/a"), MediaFetchError)


async def test_a_port_without_a_listener(origin: Origin, source: MediaSource, refused: Refused) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    assert "reached" in await refused(source, f"http://127.0.0.1:{port}/secret", MediaFetchError)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "photo.png",
        "/etc/secret",
        "ftp://127.0.0.1/secret",
        "gopher://127.0.0.1/",
        "javascript:secret",
        " http://127.0.0.1/",
        "http",
        "http:",
        "http://",
        "http:///secret",
        "http://:80/",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "http://user@127.0.0.1/",
        "http://user:secret@127.0.0.1/",
        "http://\ud800/",
        "http://a\x00b/",
        "http://127.0.0.1/" + "a" * 9000,
    ],
)
async def test_references_that_cannot_be_used(source: MediaSource, refused: Refused, reference: str) -> None:
    await refused(source, reference, MediaReferenceError)
