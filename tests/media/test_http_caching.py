"""http(s) references through the cache: what is asked for again, and how (RFC 9111)."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest

from tests.media.conftest import Refused, limited
from tests.media.origin import Asked, Origin, Resource, answer
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaFetchError
from trtllm_mm_cache.media import MediaSource

BODY = bytes(range(256)) * 40


@pytest.mark.parametrize(
    "headers",
    [
        {"Cache-Control": "max-age=60"},
        {"Cache-Control": "private, max-age=60"},
        {"Cache-Control": "public, MAX-AGE=60", "Vary": "Accept"},
        {"Expires": formatdate(time.time() + 86_400, usegmt=True)},
        {"Cache-Control": "max-age=60", "ETag": '"a"', "Date": "garbage"},
    ],
)
async def test_a_fresh_response_is_not_asked_for_again(
    origin: Origin, source: MediaSource, headers: dict[str, str]
) -> None:
    origin.routes["/a"] = Resource(BODY, headers)
    assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(3)] == [BODY] * 3
    assert len(origin.asked) == 1


async def test_a_fragment_is_no_part_of_the_url(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60"})
    origin.routes["/b"] = Resource(b"", {"Location": "/a#there"}, status="302 Found")
    for path in ("/a#one", "/a#two", "/a", "/b"):
        assert await source.fetch(origin.url(path), Scope()) == BODY
    assert [asked.path for asked in origin.asked] == ["/a", "/b"]


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"a"'}, ("if-none-match", '"a"')),
        ({"ETag": 'W/"a"'}, ("if-none-match", 'W/"a"')),
        # Ten years old: heuristic freshness would not ask again for a week.
        (
            {"Last-Modified": "Mon, 01 Jan 2015 00:00:00 GMT"},
            ("if-modified-since", "Mon, 01 Jan 2015 00:00:00 GMT"),
        ),
        ({"ETag": '"a"', "Cache-Control": "max-age=60, no-cache"}, ("if-none-match", '"a"')),
        (
            {"ETag": '"a"', "Cache-Control": "max-age=60", "Date": formatdate(time.time() - 90, usegmt=True)},
            ("if-none-match", '"a"'),
        ),
        ({"ETag": '"a"', "Cache-Control": "max-age=60", "Vary": "*"}, ("if-none-match", '"a"')),
    ],
)
async def test_an_unchanged_url_costs_a_304(
    origin: Origin, source: MediaSource, headers: dict[str, str], condition: tuple[str, str]
) -> None:
    resource = origin.routes["/a"] = Resource(BODY, headers)
    assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(3)] == [BODY] * 3
    assert len(origin.asked) == 3
    assert resource.bodies_sent == 1
    assert all(condition in asked.headers.items() for asked in origin.asked[1:])


async def test_a_changed_url_gives_the_new_bytes(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(BODY, {"ETag": '"a"'})
    assert await source.fetch(origin.url("/a"), Scope()) == BODY
    changed = origin.routes["/a"] = Resource(BODY[::-1], {"ETag": '"b"'})
    assert await source.fetch(origin.url("/a"), Scope()) == BODY[::-1]
    assert await source.fetch(origin.url("/a"), Scope()) == BODY[::-1]
    assert changed.bodies_sent == 1


async def test_a_304_can_make_a_response_fresh_again(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(BODY, {"ETag": '"a"', "Cache-Control": "no-cache"})
    await source.fetch(origin.url("/a"), Scope())
    origin.routes["/a"] = Resource(BODY, {"ETag": '"a"', "Cache-Control": "max-age=60"})
    assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(3)] == [BODY] * 3
    assert len(origin.asked) == 2


async def test_a_response_without_a_date_grows_old(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(BODY, {"ETag": '"a"', "Cache-Control": "max-age=1"})
    deadline = time.monotonic() + 10
    while len(origin.asked) < 2:
        assert time.monotonic() < deadline, "one second of freshness never ends"
        assert await source.fetch(origin.url("/a"), Scope()) == BODY
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "headers", [{}, {"Cache-Control": "no-store", "ETag": '"a"'}, {"Cache-Control": "x=="}]
)
async def test_what_cannot_be_reused_is_fetched_whole_each_time(
    origin: Origin, source: MediaSource, headers: dict[str, str]
) -> None:
    resource = origin.routes["/a"] = Resource(BODY, headers)
    assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(2)] == [BODY] * 2
    assert resource.bodies_sent == 2
    assert "if-none-match" not in origin.asked[1].headers


async def test_errors_are_not_remembered(origin: Origin, source: MediaSource, refused: Refused) -> None:
    origin.routes["/a"] = Resource(b"gone", {"Cache-Control": "max-age=60"}, status="404 Not Found")
    assert "404" in await refused(source, origin.url("/a"), MediaFetchError)
    origin.routes["/a"] = Resource(BODY)
    assert await source.fetch(origin.url("/a"), Scope()) == BODY


async def test_the_cache_can_be_switched_off(origin: Origin) -> None:
    resource = origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60", "ETag": '"a"'})
    async with limited(http_cache_mb=0) as source:
        assert [await source.fetch(origin.url("/a"), Scope()) for _ in range(2)] == [BODY] * 2
    assert resource.bodies_sent == 2


async def test_a_body_cut_short_is_neither_returned_nor_kept(
    origin: Origin, source: MediaSource, refused: Refused
) -> None:
    async def cut(asked: Asked, writer: asyncio.StreamWriter) -> None:
        answer(writer, "200 OK", {"Content-Length": str(len(BODY)), "Cache-Control": "max-age=60"}, BODY[:-1])
        await writer.drain()
        writer.close()

    origin.routes["/a"] = cut
    await refused(source, origin.url("/a"), MediaFetchError)
    origin.routes["/a"] = Resource(BODY)
    assert await source.fetch(origin.url("/a"), Scope()) == BODY


async def test_each_salt_fetches_for_itself(origin: Origin, source: MediaSource) -> None:
    resource = origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60", "ETag": '"a"'})
    for salt in ("one", "one", "other", "", "one", "other"):
        assert await source.fetch(origin.url("/a"), Scope.of(salt)) == BODY
    assert resource.bodies_sent == 3
    assert not any("if-none-match" in asked.headers for asked in origin.asked), "a 304 would tell as much"


async def test_a_redirect_is_followed_within_the_salt(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(b"", {"Location": "/b"}, status="302 Found")
    resource = origin.routes["/b"] = Resource(BODY, {"Cache-Control": "max-age=60"})
    for salt in ("one", "other", "one"):
        assert await source.fetch(origin.url("/a"), Scope.of(salt)) == BODY
    assert resource.bodies_sent == 2


async def test_no_two_pairs_of_salt_and_url_look_alike(origin: Origin, source: MediaSource) -> None:
    resource = origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60"})
    url = origin.url("/a")
    for salt in ("", "1:", f"{url}", "0:", "\x00", "é"):
        await source.fetch(url, Scope.of(salt))
    assert resource.bodies_sent == 6


async def test_what_may_not_be_retained_is_neither_reused_nor_kept(
    origin: Origin, source: MediaSource
) -> None:
    resource = origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60", "ETag": '"a"'})
    alone = Scope("one", retain=False)  # the same salt, so that only `retain` can tell them apart
    for scope in (Scope.of("one"), alone, alone, Scope.of("one")):
        assert await source.fetch(origin.url("/a"), scope) == BODY
    assert resource.bodies_sent == 3


async def test_what_is_forgotten_is_asked_for_again(origin: Origin, source: MediaSource) -> None:
    for path in ("/a", "/b"):
        origin.routes[path] = Resource(BODY, {"Cache-Control": "max-age=60"})
        await source.fetch(origin.url(path), Scope())
    assert source.forget() == 2
    assert source.forget() == 0
    await source.fetch(origin.url("/a"), Scope())
    assert [asked.path for asked in origin.asked] == ["/a", "/b", "/a"]


async def test_what_is_arriving_when_all_is_forgotten_is_not_kept(
    origin: Origin, source: MediaSource
) -> None:
    go_on = asyncio.Event()

    async def slow(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        answer(writer, "200 OK", {"Cache-Control": "max-age=60"}, BODY)

    origin.routes["/a"] = slow
    fetch = asyncio.create_task(source.fetch(origin.url("/a"), Scope()))
    await origin.until_asked(1)
    assert source.forget() == 0
    go_on.set()
    assert await fetch == BODY
    assert await source.fetch(origin.url("/a"), Scope()) == BODY
    assert len(origin.asked) == 2
