"""The HTTP cache's storage: bounded in bytes, least recently used out first, readers undisturbed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from hishel import Entry, Headers, Request, Response

from trtllm_mm_cache.media.http_cache import MemoryStorage

REQUEST = Request("GET", "http://images.test/a")


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(entry: Entry) -> bytes:
    assert isinstance(entry.response.stream, AsyncIterable)
    return b"".join([chunk async for chunk in entry.response.stream])


async def put(storage: MemoryStorage, key: str, *chunks: bytes) -> Entry:
    entry = await storage.create_entry(REQUEST, Response(200, Headers({"etag": '"a"'}), stream(*chunks)), key)
    assert await read(entry) == b"".join(chunks)
    return entry


async def keys(storage: MemoryStorage, *candidates: str) -> set[str]:
    return {key for key in candidates if await storage.get_entries(key)}


async def test_an_entry_is_there_only_once_its_body_was_read() -> None:
    storage = MemoryStorage(10_000)
    entry = await storage.create_entry(REQUEST, Response(200, Headers({}), stream(b"a", b"b")), "k")
    assert await storage.get_entries("k") == []
    assert await read(entry) == b"ab"
    (found,) = await storage.get_entries("k")
    assert found.id == entry.id
    assert [await read(found), await read((await storage.get_entries("k"))[0])] == [b"ab", b"ab"]


async def test_the_least_recently_used_goes_first() -> None:
    storage = MemoryStorage(10_000)
    for key in "abc":
        await put(storage, key, bytes(2000))
    await storage.get_entries("a")
    await put(storage, "d", bytes(2000))
    assert await keys(storage, *"abcd") == {"a", "c", "d"}
    assert storage.current_bytes <= 10_000


async def test_the_capacity_holds_while_bodies_arrive() -> None:
    storage = MemoryStorage(10_000)
    await put(storage, "a", bytes(2000))
    arriving = [
        await storage.create_entry(REQUEST, Response(200, Headers({}), stream(*[bytes(1000)] * 6)), key)
        for key in "bc"
    ]
    bodies = [entry.response.stream for entry in arriving]
    for _ in range(6):
        for body in bodies:
            assert isinstance(body, AsyncIterator)
            assert len(await anext(body)) == 1000
            assert storage.current_bytes <= 10_000
    for body in bodies:
        assert isinstance(body, AsyncIterator)
        assert await anext(body, None) is None
    assert len(await keys(storage, *"bc")) == 1, "both do not fit, one does"


async def test_a_body_larger_than_everything_pushes_nothing_out() -> None:
    storage = MemoryStorage(10_000)
    await put(storage, "a", bytes(2000))
    await put(storage, "b", bytes(20_000))
    assert await keys(storage, *"ab") == {"a"}


async def test_a_body_that_turns_out_too_large_is_dropped() -> None:
    storage = MemoryStorage(10_000)
    await put(storage, "a", *[bytes(1000)] * 20)
    assert await keys(storage, "a") == set()
    assert storage.current_bytes == 0


async def test_a_body_that_is_given_up_leaves_nothing() -> None:
    storage = MemoryStorage(10_000)
    entry = await storage.create_entry(REQUEST, Response(200, Headers({}), stream(b"a", b"b")), "k")
    body = entry.response.stream
    assert isinstance(body, AsyncGenerator)
    await anext(body)
    assert storage.current_bytes > 0
    await body.aclose()
    assert storage.current_bytes == 0
    assert await storage.get_entries("k") == []


async def test_a_reader_keeps_its_body_when_the_entry_goes() -> None:
    storage = MemoryStorage(10_000)
    await put(storage, "k", b"a", b"b", b"c")
    (found,) = await storage.get_entries("k")
    body = found.response.stream
    assert isinstance(body, AsyncIterator)
    assert await anext(body) == b"a"
    await storage.remove_entry(found.id)
    await put(storage, "k", b"x")
    assert [chunk async for chunk in body] == [b"b", b"c"]


async def test_a_newer_response_replaces_the_older() -> None:
    storage = MemoryStorage(10_000)
    older = await put(storage, "k", b"old")
    used = storage.current_bytes
    newer = await put(storage, "k", b"new")
    assert storage.current_bytes == used
    (found,) = await storage.get_entries("k")
    assert (found.id, await read(found)) == (newer.id, b"new")
    await storage.remove_entry(older.id)  # of no effect: it is gone already
    assert await keys(storage, "k") == {"k"}


async def test_headers_are_replaced_and_counted() -> None:
    storage = MemoryStorage(10_000)
    entry = await put(storage, "k", b"body")
    used = storage.current_bytes
    await storage.update_headers(entry.id, Headers({"etag": '"a"', "x": "y" * 500}))
    assert storage.current_bytes == used + 501
    (found,) = await storage.get_entries("k")
    assert found.response.headers["x"] == "y" * 500
    await storage.update_headers(entry.id, Headers({"x": "y" * 50_000}))
    assert await storage.get_entries("k") == []
    assert storage.current_bytes == 0
    await storage.update_headers(entry.id, Headers({}))  # of no effect: it is gone


async def test_removing_and_closing_free_everything() -> None:
    storage = MemoryStorage(10_000)
    entry = await put(storage, "a", bytes(100))
    await put(storage, "b", bytes(100))
    await storage.remove_entry(entry.id)
    assert await keys(storage, "a", "b") == {"b"}
    await storage.close()
    assert storage.current_bytes == 0
    assert await storage.get_entries("b") == []
