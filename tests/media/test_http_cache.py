"""The HTTP cache's memory: bounded in bytes, least recently used out first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trtllm_mm_cache.media.freshness import Moment, Reuse
from trtllm_mm_cache.media.http_cache import CachedResponse, ResponseCache

START = Moment(1_800_000_000, 0)


def response(size: int, location: str | None = None, **fields: str) -> CachedResponse:
    lines = {name.replace("_", "-"): (value,) for name, value in fields.items()} or {"etag": ('"a"',)}
    return CachedResponse(Reuse.of(lines, asked=START, received=START), bytes(size), location)


@pytest.fixture
def cache() -> Iterator[ResponseCache]:
    made = ResponseCache(10_000)
    yield made
    assert 0 <= made.current_bytes <= 10_000
    made.clear()
    assert made.current_bytes == 0


def kept(cache: ResponseCache, keys: str) -> set[str]:
    return {key for key in keys if cache.get(key) is not None}


def test_the_least_recently_used_goes_first(cache: ResponseCache) -> None:
    for key in "abc":
        cache.put(key, response(2000))
    assert cache.get("a") is not None
    cache.put("d", response(2000))
    assert kept(cache, "abcd") == {"a", "c", "d"}


def test_what_can_never_fit_pushes_nothing_out(cache: ResponseCache) -> None:
    cache.put("a", response(2000))
    cache.put("b", response(10_000))
    assert kept(cache, "ab") == {"a"}


def test_header_fields_and_targets_are_charged(cache: ResponseCache) -> None:
    cache.put("a", response(0, etag="x" * 6000))
    cache.put("b", response(0, cache_control="max-age=60", location="/" + "x" * 6000))
    assert kept(cache, "ab") == {"b"}


def test_a_newer_response_takes_the_place_of_an_older_one(cache: ResponseCache) -> None:
    for size in (5000, 7000, 10):
        cache.put("a", response(size))
        assert (found := cache.get("a")) is not None
        assert len(found.body) == size
    before = cache.current_bytes
    cache.put("a", response(10))
    assert cache.current_bytes == before


@pytest.mark.parametrize(
    "fields", [{"cache_control": "no-store, max-age=60"}, {"cache_control": "max-age=0"}]
)
def test_what_may_not_be_kept_takes_the_older_one_with_it(
    cache: ResponseCache, fields: dict[str, str]
) -> None:
    cache.put("a", response(10))
    cache.put("a", response(10, **fields))
    assert cache.get("a") is None


def test_a_redirect_is_kept_only_while_it_is_fresh(cache: ResponseCache) -> None:
    cache.put("a", response(0, location="/b"))
    cache.put("b", response(0, location="/b", cache_control="max-age=60"))
    assert kept(cache, "ab") == {"b"}


def test_clearing_says_how_many_there_were(cache: ResponseCache) -> None:
    for key in "abc":
        cache.put(key, response(10))
    assert [cache.clear(), cache.clear()] == [3, 0]
    assert kept(cache, "abc") == set()


def test_no_room_at_all() -> None:
    cache = ResponseCache(0)
    cache.put("a", response(0))
    assert cache.get("a") is None
    assert cache.current_bytes == 0
