"""RFC 9111, header by header: a changed image is fetched anew unless the first answer said that it is fresh.

Each row is an answer's headers, the seconds until the URL is asked for again, and what must happen then:
`used` without a word to the server, `asked` whether it has changed (If-None-Match, If-Modified-Since), or
fetched `whole` because there is nothing to ask with or nothing was kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest

from tests.media.conftest import Refused
from tests.media.images import LIMITS
from tests.media.origin import Asked, Headers, Origin, Resource, Responder, answer
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaFetchError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.media.freshness import Moment
from trtllm_mm_cache.settings import MediaSettings

OLD, NEW = b"old" * 1000, b"new" * 1000
Lines = list[tuple[str, Any]]
"""Header fields; a number stands for the date that many seconds from when the answer is sent."""


class HandSetClock:
    """Two clocks that move only when they are told to."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_800_000_000.0, 0.0

    def __call__(self) -> Moment:
        return Moment(self.wall, self.steady)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


def control(*lines: str) -> Lines:
    return [("Cache-Control", line) for line in lines]


def date(seconds: float) -> Lines:
    return [("Date", seconds)]


def sent(lines: Lines, clock: HandSetClock) -> list[tuple[str, str]]:
    """Write the dates, by a server whose clock agrees with ours."""

    def written(value: Any) -> str:
        return value if isinstance(value, str) else formatdate(clock.wall + value, usegmt=True)

    return [(name, written(value)) for name, value in lines]


TAG: Lines = [("ETag", '"a"')]
MODIFIED: Lines = [("Last-Modified", "Mon, 01 Jan 2015 00:00:00 GMT")]
FRESH = control("max-age=60")

ROWS: dict[str, tuple[Lines, float, str]] = {
    # What says that it is fresh, and for how long.
    "max-age": (FRESH, 59, "used"),
    "max-age, passed": (FRESH, 60, "whole"),
    "max-age, passed, with a tag": (FRESH + TAG, 60, "asked"),
    "max-age=0": (control("max-age=0") + TAG, 0, "asked"),
    "max-age in capitals, quoted": (control('MAX-AGE="60"'), 59, "used"),
    "max-age among others": (control("public, no-transform , max-age=60,immutable"), 59, "used"),
    "max-age on a line of its own": (control("public", "max-age=60"), 59, "used"),
    "Expires": ([*date(0), ("Expires", 60)], 59, "used"),
    "Expires, passed": ([*date(0), ("Expires", 60)], 60, "whole"),
    "Expires without a Date": ([("Expires", 60)], 59, "used"),
    "Expires counts from Date": ([*date(3600), ("Expires", 3660)], 59, "used"),
    "Expires before Date": ([*date(0), ("Expires", -60)], 0, "whole"),
    "max-age before Expires": ([*control("max-age=10"), ("Expires", 60)], 30, "whole"),
    "Expires in RFC 850's form": ([("Expires", "Sunday, 06-Nov-94 08:49:37 GMT")], 0, "whole"),
    "Expires in asctime's form": ([("Expires", "Sun Nov  6 08:49:37 2094")], 59, "used"),
    # What does not.
    "nothing": ([], 0, "whole"),
    "a tag alone": (TAG, 0, "asked"),
    "no heuristic from Last-Modified": (MODIFIED, 0, "asked"),
    "no heuristic from public": (control("public") + MODIFIED, 0, "asked"),
    "no heuristic from private": (control("private") + MODIFIED, 0, "asked"),
    "no heuristic from immutable": (control("immutable") + TAG, 0, "asked"),
    "s-maxage is for shared caches": (control("s-maxage=60") + TAG, 0, "asked"),
    "s-maxage=0 too": (control("max-age=60, s-maxage=0"), 59, "used"),
    "private": (control("private, max-age=60"), 59, "used"),
    'private="field"': (control('private="set-cookie", max-age=60'), 59, "used"),
    # Age.
    "Age": ([*FRESH, ("Age", "30")], 29, "used"),
    "Age, passed later": ([*FRESH, ("Age", "30")], 30, "whole"),
    "Age beyond max-age": ([*FRESH, *TAG, ("Age", "100")], 0, "asked"),
    "Age equal to max-age": ([*FRESH, *TAG, ("Age", "60")], 0, "asked"),
    "Age beyond Expires": ([*date(0), ("Expires", 60), ("Age", "100")], 0, "whole"),
    "Age too large to count": ([*FRESH, ("Age", "9" * 5000)], 0, "whole"),
    "Age: a list": ([*FRESH, ("Age", "100, 1")], 0, "whole"),
    "Age twice": ([*FRESH, ("Age", "100"), ("Age", "1")], 0, "whole"),
    "Age: nonsense": ([*FRESH, ("Age", "old")], 59, "used"),
    "Age: negative": ([*FRESH, ("Age", "-5")], 59, "used"),
    # Date.
    "Date in the past": (FRESH + date(-90) + TAG, 0, "asked"),
    "Date in the past, Age older": ([*control("max-age=200"), *date(-90), ("Age", "150")], 60, "whole"),
    "Date in the future": (FRESH + date(3600), 60, "whole"),
    "Date: nonsense": ([*FRESH, ("Date", "yesterday")], 60, "whole"),
    "Date: another zone": ([*FRESH, ("Date", "Thu, 01 Jan 1970 00:00:00 PST")], 59, "used"),
    "Date: year 99999": ([*FRESH, ("Date", "Thu, 01 Jan 99999 00:00:00 GMT")], 60, "whole"),
    "Date twice": (FRESH + date(-90) + date(0), 59, "used"),
    # What forbids it.
    "no-cache": (control("no-cache, max-age=60") + TAG, 0, "asked"),
    "no-cache on another line": (control("max-age=60", "No-Cache") + TAG, 0, "asked"),
    'no-cache="field"': (control('no-cache="set-cookie", max-age=60') + TAG, 0, "asked"),
    "no-store": (control("no-store, max-age=60") + TAG, 0, "whole"),
    "no-store with an argument": (control("no-store=1, max-age=60") + TAG, 0, "whole"),
    "no-store, must-understand": (control("must-understand, no-store, max-age=60") + TAG, 0, "whole"),
    "no-store behind an open quote": (control('max-age=60, x="a, no-store') + TAG, 0, "whole"),
    "Pragma": ([("Pragma", "no-cache"), ("Expires", 60), *TAG], 0, "asked"),
    "Pragma beside Cache-Control": ([("Pragma", "no-cache"), *FRESH], 59, "used"),
    "Vary: *": ([*FRESH, *TAG, ("Vary", "*")], 0, "asked"),
    "Vary: * among others": ([*FRESH, *TAG, ("Vary", "Accept"), ("Vary", "Origin, *")], 0, "asked"),
    "Vary by what is always the same": ([*FRESH, ("Vary", "Accept, Accept-Encoding, Cookie")], 59, "used"),
    # Stale is never used, whatever allows it.
    "must-revalidate": (control("max-age=60, must-revalidate") + TAG, 60, "asked"),
    "stale-while-revalidate": (control("max-age=60, stale-while-revalidate=600") + TAG, 60, "asked"),
    "stale-if-error": (control("max-age=60, stale-if-error=600") + TAG, 60, "asked"),
    # Contradictions and nonsense are stale.
    "max-age twice, differing": (control("max-age=60, max-age=0") + TAG, 0, "asked"),
    "max-age twice on two lines": (control("max-age=0", "max-age=60") + TAG, 0, "asked"),
    "max-age twice, the same": (control("max-age=60, max-age=60"), 59, "used"),
    "max-age: negative": ([*control("max-age=-1"), *TAG, ("Expires", 60)], 0, "asked"),
    "max-age: signed": (control("max-age=+60") + TAG, 0, "asked"),
    "max-age: a fraction": (control("max-age=60.5") + TAG, 0, "asked"),
    "max-age: underscores": (control("max-age=6_0") + TAG, 0, "asked"),
    "max-age: other digits": (control("max-age=\xb2\xb2") + TAG, 0, "asked"),
    "max-age: words": (control("max-age=forever") + MODIFIED, 0, "asked"),
    "max-age: nothing": (control("max-age=") + TAG, 0, "asked"),
    "max-age: no argument": (control("max-age") + MODIFIED, 0, "asked"),
    "max-age: too large to count": (control("max-age=" + "9" * 5000), 10**9, "used"),
    "Expires: 0": ([("Expires", "0"), *MODIFIED], 0, "asked"),
    "Expires: -1": ([("Expires", "-1"), *MODIFIED], 0, "asked"),
    "Expires: nonsense": ([("Expires", "never"), *MODIFIED], 0, "asked"),
    "Expires: year 99999": ([("Expires", "Thu, 01 Jan 99999 00:00:00 GMT"), *TAG], 0, "asked"),
    "Expires twice, differing": ([("Expires", 60), ("Expires", 90), *TAG], 0, "asked"),
    "Cache-Control: nonsense": (control(" ,;=\"'\\,, =x") + TAG, 0, "asked"),
    # Validators.
    "a weak tag": ([("ETag", 'W/"a"')], 0, "asked"),
    "a tag that should have quotes": ([("ETag", "a")], 0, "asked"),
    "two tags": ([("ETag", '"a"'), ("ETag", '"b"')], 0, "whole"),
}


@pytest.fixture
def clock() -> HandSetClock:
    return HandSetClock()


@pytest.fixture
async def source(clock: HandSetClock) -> AsyncIterator[MediaSource]:
    async with MediaSource(MediaSettings(allow_private_addresses=True), LIMITS, clock=clock) as opened:
        yield opened


async def second_fetch(origin: Origin, source: MediaSource) -> str:
    """Say what a fetch of the image, which has changed, does."""
    asked_before = len(origin.asked)
    body = await source.fetch(origin.url("/a"), Scope())
    if len(origin.asked) == asked_before:
        assert body == OLD
        return "used"
    assert body == NEW
    conditions = {"if-none-match", "if-modified-since"} & set(origin.asked[-1].headers)
    return "asked" if conditions else "whole"


@pytest.mark.parametrize("name", ROWS)
async def test_a_changed_image_is_used_from_the_cache_only_while_it_is_fresh(
    origin: Origin, source: MediaSource, clock: HandSetClock, name: str
) -> None:
    headers, seconds, expected = ROWS[name]
    origin.routes["/a"] = Resource(OLD, sent(headers, clock))
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    origin.routes["/a"] = Resource(NEW, [("ETag", '"changed"')])
    clock.pass_(seconds)
    assert await second_fetch(origin, source) == expected


def unchanged(headers: Headers) -> Responder:
    """Answer 304 with `headers`, whatever is asked."""

    async def respond(asked: Asked, writer: asyncio.StreamWriter) -> None:
        answer(writer, "304 Not Modified", headers)

    return respond


RENEWALS: dict[str, tuple[Lines, Lines, float, str]] = {
    "its max-age is the new one": (control("max-age=10"), control("max-age=60"), 50, "used"),
    "its shorter max-age too": (control("max-age=60"), control("max-age=10"), 50, "asked"),
    "without a max-age the old one holds again": (control("max-age=60"), [], 50, "used"),
    "and ends again": (control("max-age=60"), [], 60, "asked"),
    "its Age counts": (control("max-age=60"), [("Age", "50")], 20, "asked"),
    "its Date counts": (control("max-age=60"), date(-50), 80, "asked"),
    "the Age of the first answer does not": ([*control("max-age=60"), ("Age", "50")], [], 50, "used"),
    "its Expires is the new one": ([("Expires", 10)], [("Expires", 200)], 50, "used"),
    "an old Expires stays where it was": ([("Expires", 60)], [], 0, "asked"),
    "no-cache": (control("max-age=60"), control("no-cache"), 0, "asked"),
    "no-store": (control("max-age=60"), control("no-store"), 0, "whole"),
    "Vary: *": (control("max-age=60"), [("Vary", "*")], 0, "asked"),
    "a tag that came with it is asked with": (control("max-age=0"), [("ETag", 'W/"a"')], 0, "asked"),
}


@pytest.mark.parametrize("name", RENEWALS)
async def test_a_304_renews_what_is_known(
    origin: Origin, source: MediaSource, clock: HandSetClock, name: str
) -> None:
    first, renewal, seconds, expected = RENEWALS[name]
    origin.routes["/a"] = Resource(OLD, sent([*first, *TAG], clock))
    await source.fetch(origin.url("/a"), Scope())
    clock.pass_(100)
    origin.routes["/a"] = unchanged(sent(renewal, clock))
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert origin.asked[-1].headers["if-none-match"] == '"a"'
    origin.routes["/a"] = Resource(NEW, [("ETag", '"changed"')])
    clock.pass_(seconds)
    assert await second_fetch(origin, source) == expected


@pytest.mark.parametrize(
    "about_another",
    [[("ETag", '"b"')], [("ETag", 'W/"b"')], [("ETag", '"b"'), ("Cache-Control", "max-age=60")]],
)
async def test_a_304_about_another_image_is_not_believed(
    origin: Origin, source: MediaSource, about_another: Lines
) -> None:
    origin.routes["/a"] = Resource(OLD, {"ETag": '"a"'})
    await source.fetch(origin.url("/a"), Scope())

    async def respond(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "if-none-match" in asked.headers:
            answer(writer, "304 Not Modified", about_another)
        else:
            answer(writer, "200 OK", {"ETag": '"b"'}, NEW)

    origin.routes["/a"] = respond
    assert await source.fetch(origin.url("/a"), Scope()) == NEW
    assert len(origin.asked) == 3


async def test_a_304_about_another_date_is_not_believed(origin: Origin, source: MediaSource) -> None:
    origin.routes["/a"] = Resource(OLD, MODIFIED)
    await source.fetch(origin.url("/a"), Scope())

    async def respond(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "if-modified-since" in asked.headers:
            answer(writer, "304 Not Modified", [("Last-Modified", "Fri, 02 Jan 2015 00:00:00 GMT")])
        else:
            answer(writer, "200 OK", {}, NEW)

    origin.routes["/a"] = respond
    assert await source.fetch(origin.url("/a"), Scope()) == NEW


async def test_a_304_that_was_not_asked_for_is_an_error(
    origin: Origin, source: MediaSource, refused: Refused
) -> None:
    origin.routes["/a"] = unchanged([("ETag", '"a"')])
    assert "304" in await refused(source, origin.url("/a"), MediaFetchError)


async def test_setting_the_clock_makes_nothing_fresh(
    origin: Origin, source: MediaSource, clock: HandSetClock
) -> None:
    origin.routes["/a"] = Resource(OLD, {"Cache-Control": "max-age=60"})
    await source.fetch(origin.url("/a"), Scope())
    clock.wall -= 3600
    clock.pass_(59)
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert len(origin.asked) == 1
    origin.routes["/a"] = Resource(NEW)
    clock.pass_(1)
    assert await second_fetch(origin, source) == "whole"


async def test_a_clock_set_forward_costs_a_question(
    origin: Origin, source: MediaSource, clock: HandSetClock
) -> None:
    """Nobody can tell it from a machine that slept, when the steady clock stood still."""
    resource = origin.routes["/a"] = Resource(OLD, FRESH + TAG)
    await source.fetch(origin.url("/a"), Scope())
    clock.wall += 3600
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert len(origin.asked) == 2
    assert resource.bodies_sent == 1


async def test_a_slow_answer_is_as_old_as_it_was_slow(
    origin: Origin, source: MediaSource, clock: HandSetClock
) -> None:
    async def respond(asked: Asked, writer: asyncio.StreamWriter) -> None:
        clock.pass_(25)  # on its way
        answer(writer, "200 OK", [*FRESH, ("Age", "10")], OLD)

    origin.routes["/a"] = respond
    await source.fetch(origin.url("/a"), Scope())
    origin.routes["/a"] = Resource(NEW)
    clock.pass_(20)
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    clock.pass_(10)
    assert await second_fetch(origin, source) == "whole"


REDIRECTS = ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]


@pytest.mark.parametrize("status", REDIRECTS)
async def test_a_fresh_redirect_is_followed_without_asking(
    origin: Origin, source: MediaSource, clock: HandSetClock, status: str
) -> None:
    origin.routes["/a"] = Resource(b"", [*control("max-age=30"), ("Location", "/b")], status)
    origin.routes["/b"] = Resource(OLD, {"Cache-Control": "max-age=60"})
    for _ in range(2):
        assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert [asked.path for asked in origin.asked] == ["/a", "/b"]
    clock.pass_(40)
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert [asked.path for asked in origin.asked] == ["/a", "/b", "/a"]
    clock.pass_(25)
    await source.fetch(origin.url("/a"), Scope())
    assert [asked.path for asked in origin.asked[3:]] == ["/b"], "only the image has become stale"


@pytest.mark.parametrize("status", REDIRECTS)
@pytest.mark.parametrize("headers", [[], TAG, MODIFIED, control("no-store, max-age=60")])
async def test_a_redirect_that_does_not_say_how_long_it_holds_is_asked_for_each_time(
    origin: Origin, source: MediaSource, status: str, headers: Lines
) -> None:
    """Also a permanent one: a heuristic could keep it for ever."""
    origin.routes["/a"] = Resource(b"", [*headers, ("Location", "/b")], status)
    origin.routes["/b"] = Resource(OLD, {"Cache-Control": "max-age=60"})
    for _ in range(2):
        assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert [asked.path for asked in origin.asked] == ["/a", "/b", "/a"]
    assert "if-none-match" not in origin.asked[-1].headers


ERRORS = ["204 No Content", "206 Partial", "300 Multiple", "400 Bad", "403 No", "404 Not Found", "410 Gone"]


@pytest.mark.parametrize("status", [*ERRORS, "414 Too Long", "500 Error", "501 What", "503 Busy", "504 Late"])
async def test_an_error_is_never_kept_and_never_answered_with_what_is_stale(
    origin: Origin, source: MediaSource, clock: HandSetClock, refused: Refused, status: str
) -> None:
    resource = Resource(OLD, [*control("max-age=60, stale-if-error=600"), *TAG])
    failing = Resource(b"", control("max-age=600"), status)
    origin.routes["/a"] = failing
    await refused(source, origin.url("/a"), MediaFetchError)
    origin.routes["/a"] = resource
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    clock.pass_(61)
    origin.routes["/a"] = failing
    await refused(source, origin.url("/a"), MediaFetchError)
    origin.routes["/a"] = resource
    assert await source.fetch(origin.url("/a"), Scope()) == OLD
    assert resource.bodies_sent == 1, "what is stale can still be asked about when the server is back"
