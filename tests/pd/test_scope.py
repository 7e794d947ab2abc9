"""Tenants by `cache_salt`: nothing that a request shows tells whether another tenant's image is cached.

Each test asks twice, from a tenant that has never seen a picture: once where another tenant has it (in the
cache, in a flight, in the HTTP cache), once where none has. Everything countable must be the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.stack import new_image, png
from tests.media.origin import Resource, serving
from tests.pd.bench import Bench, assert_holds, image_url
from trtllm_mm_cache.errors import EncodeUnavailableError
from trtllm_mm_cache.pd.resolved import ResolvedItems


def counts(bench: Bench) -> dict[tuple[str, str], float]:
    """Every count that a PD worker shows, without those that are durations."""
    shown = {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(bench.metrics.registry).decode())
        for sample in family.samples
        if not sample.name.endswith(("_sum", "_bucket", "_created"))
    }
    flights, cache = bench.tiers.flights, bench.cache.statistics()
    return shown | {
        ("flights", "started"): flights.started,
        ("flights", "joined"): flights.joined,
        ("cache", "hits"): cache.hits,
        ("cache", "misses"): cache.misses,
        ("reads", "bytes"): bench.reader.completed_bytes,
        ("encode worker", "calls"): len(bench.peer.calls),
    }


def shown(images: ResolvedItems) -> dict[str, Any]:
    """What a request's log line and the metrics by kind of request are made of."""
    values = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    del values["leases"], values["seconds"]
    return values


async def observed(bench: Bench, ask: Callable[[], Awaitable[ResolvedItems]]) -> Any:
    """Everything that changes by one request. One encode worker: which one is asked depends on the key."""
    bench.peer.instances = [1]
    (await bench.resolve([image_url()], salt="yet another")).release()  # its breaker is known from here on
    before = counts(bench)
    images = await ask()
    assert_holds(images.leases[0])
    values = shown(images)
    images.release()
    after = counts(bench)
    return values, {name: after[name] - before.get(name, 0) for name in after}


async def test_another_tenants_hit_is_a_miss_like_any_other(bench: Bench) -> None:
    known, unknown = image_url(), image_url()
    (await bench.resolve([known], salt="a")).release()
    (await bench.resolve([known], salt="a")).release()
    seen = await observed(bench, lambda: bench.resolve([known], salt="b"))
    unseen = await observed(bench, lambda: bench.resolve([unknown], salt="b"))
    assert seen == unseen
    assert seen[0]["misses"] == 1
    assert seen[1]["encode worker", "calls"] == 1


@pytest.mark.parametrize("salt", ["b", None])
async def test_no_request_joins_another_tenants_flight(bench: Bench, salt: str | None) -> None:
    known, unknown = image_url(), image_url()

    async def until_called(count: int) -> None:
        async with asyncio.timeout(5):
            while len(bench.peer.calls) < count:
                await asyncio.sleep(0)

    async def ask_while_a_flies(reference: str) -> ResolvedItems:
        calls = len(bench.peer.calls)
        bench.peer.gate.clear()
        flying = asyncio.create_task(bench.resolve([known], salt="a"))
        await until_called(calls + 1)
        asking = asyncio.create_task(bench.resolve([reference], salt=salt))
        await until_called(calls + 2)
        bench.peer.gate.set()
        (await flying).release()
        bench.cache.clear()
        return await asking

    seen = await observed(bench, lambda: ask_while_a_flies(known))
    unseen = await observed(bench, lambda: ask_while_a_flies(unknown))
    assert seen == unseen
    assert seen[0]["joined"] == seen[1]["flights", "joined"] == 0


async def test_without_an_encode_worker_another_tenants_image_is_as_missing_as_any(bench: Bench) -> None:
    known = image_url()
    (await bench.resolve([known], salt="a")).release()
    bench.peer.instances = []
    messages = set()
    for reference in (known, image_url()):
        with pytest.raises(EncodeUnavailableError) as caught:
            await bench.resolve([reference], salt="b")
        messages.add(str(caught.value))
    assert len(messages) == 1
    (await bench.resolve([known], salt="a")).release()


@pytest.mark.parametrize("allow_private_addresses", [True])
@pytest.mark.parametrize("require_salt", [False, True])
@pytest.mark.parametrize("salt", ["b", None])
async def test_a_url_that_another_tenant_fetched_is_fetched_again(bench: Bench, salt: str | None) -> None:
    async with serving() as origin:
        resource = origin.routes["/a"] = Resource(png(new_image(32, 32)), {"Cache-Control": "max-age=60"})
        for asker in ("a", "a", salt):
            (await bench.resolve([origin.url("/a")], salt=asker)).release()
        assert resource.bodies_sent == 2
        assert len(origin.asked) == 2


async def test_keys_of_tenants_never_meet(bench: Bench) -> None:
    reference = image_url()
    keys = set()
    for salt in ("a", "b", "ab", "a\0", "", None, "a "):  # an empty salt is none
        images = await bench.resolve([reference], salt=salt)
        keys.add(images.leases[0].key)
        images.release()
    assert len(keys) == 6
