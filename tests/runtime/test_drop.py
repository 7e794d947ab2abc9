"""A drop at a PD worker: what is stored, what is held, and above all what is on its way."""

from __future__ import annotations

import asyncio

import pytest
from dynamo.runtime import Context

from tests.pd.bench import NBYTES, Bench, assert_holds, image_url
from trtllm_mm_cache.cache.key import content_digest
from trtllm_mm_cache.cache.scope import salt_tag
from trtllm_mm_cache.errors import ChecksumMismatchError
from trtllm_mm_cache.media.data_url import decode_data_url
from trtllm_mm_cache.pd.resolved import ResolvedItems
from trtllm_mm_cache.runtime.control import Control, DropReport, DropRequest, control_path
from trtllm_mm_cache.runtime.messages import parse

EVERYTHING = DropRequest(everything=True)


async def in_flight(bench: Bench, reference: str, salt: str | None = None) -> asyncio.Task[ResolvedItems]:
    """Begin a request whose encode worker does not answer yet."""
    calls = len(bench.peer.calls)
    bench.peer.gate.clear()
    request = asyncio.create_task(bench.resolve([reference], salt=salt))
    async with asyncio.timeout(5):
        while len(bench.peer.calls) == calls:
            await asyncio.sleep(0)
    return request


def content_of(reference: str) -> bytes:
    return content_digest(decode_data_url(reference, 1024**2))


def selecting(reference: str, images: ResolvedItems) -> dict[str, DropRequest]:
    return {
        "its key": DropRequest(key=images.leases[0].key),
        "its salt": DropRequest(tag=salt_tag("one").hex()),
        "its image": DropRequest(content=content_of(reference).hex()),
        "everything": EVERYTHING,
        "another key": DropRequest(key="0" * 64),
        "another image": DropRequest(content="0" * 64),
        "another salt": DropRequest(tag=salt_tag("two").hex()),
    }


CONCERNED = {
    "its key": True,
    "its salt": True,
    "its image": True,
    "everything": True,
    "another key": False,
    "another salt": False,
    "another image": False,
}


@pytest.mark.parametrize("what", CONCERNED)
async def test_what_is_stored_is_gone_for_lookups_and_true_for_its_holder(bench: Bench, what: str) -> None:
    reference = image_url()
    held = await bench.resolve([reference], salt="one")
    report = await bench.resolver.drop(selecting(reference, held)[what])
    concerned = CONCERNED[what]
    assert (report.entries, report.nbytes) == ((1, NBYTES) if concerned else (0, 0))
    again = await bench.resolve([reference], salt="one")
    assert again.hits == (not concerned)
    assert_holds(held.leases[0])
    held.release()
    again.release()
    assert bench.cache.statistics().arena.used_bytes == NBYTES


@pytest.mark.parametrize("what", CONCERNED)
async def test_a_flight_under_way_is_served_and_does_not_commit_into_the_cache(
    bench: Bench, what: str
) -> None:
    reference = image_url()
    known = await bench.resolve([reference], salt="one")
    drop = selecting(reference, known)[what]
    known.release()
    await bench.resolver.drop(EVERYTHING)
    request = await in_flight(bench, reference, "one")
    dropping = asyncio.create_task(bench.resolver.drop(drop))
    await asyncio.sleep(0)
    assert dropping.done() != CONCERNED[what], "it waits for what is on its way, and for that alone"
    bench.peer.gate.set()
    images = await request
    report = await dropping
    assert (report.entries, report.under_way) == (0, 0)
    assert_holds(images.leases[0])
    images.release()
    after = await bench.resolve([reference], salt="one")
    assert after.hits == (not CONCERNED[what])
    after.release()


async def test_what_is_being_read_when_the_drop_comes_does_not_become_visible(bench: Bench) -> None:
    caught = False
    for _ in range(50):  # a READ of 4 KB may be over before this task looks again
        request = asyncio.create_task(bench.resolve([image_url()]))
        while not (caught or request.done()):
            await asyncio.sleep(0)
            caught = bench.cache.statistics().reservations == 1
        if caught:
            report = await bench.resolver.drop(EVERYTHING)
            (await request).release()
            assert report.under_way == 0
            break
        (await request).release()
    assert caught
    assert bench.cache.keys() == []


async def test_a_drop_waits_no_longer_than_it_was_told_and_says_what_is_left(bench: Bench) -> None:
    request = await in_flight(bench, image_url())
    report = await bench.resolver.drop(DropRequest(everything=True, deadline_s=0))
    assert report.under_way == 1
    bench.peer.gate.set()
    (await request).release()
    assert bench.cache.keys() == []


async def test_a_flight_that_outlives_who_began_it_is_dropped_too(bench: Bench) -> None:
    reference = image_url()
    first = await in_flight(bench, reference)
    second = asyncio.create_task(bench.resolve([reference]))
    async with asyncio.timeout(5):
        while not bench.tiers.flights.joined:
            await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    dropping = asyncio.create_task(bench.resolver.drop(EVERYTHING))
    await asyncio.sleep(0)
    bench.peer.gate.set()
    (await second).release()
    await dropping
    assert bench.cache.keys() == []


async def test_a_second_attempt_after_a_drop_asks_the_encode_worker_not_to_retain(bench: Bench) -> None:
    bench.peer.changes = [ChecksumMismatchError("damaged")]
    request = await in_flight(bench, image_url())
    dropping = asyncio.create_task(bench.resolver.drop(EVERYTHING))
    await asyncio.sleep(0)
    bench.peer.gate.set()
    (await request).release()
    await dropping
    assert bench.peer.retained == [True, False]
    assert bench.cache.keys() == []


async def test_a_request_that_comes_after_the_drop_is_cached(bench: Bench) -> None:
    reference = image_url()
    await bench.resolver.drop(EVERYTHING)
    (await bench.resolve([reference])).release()
    again = await bench.resolve([reference])
    assert again.hits == 1
    again.release()


@pytest.mark.parametrize("what", ["its key", "its salt", "its image", "everything"])
async def test_the_what_if_curve_forgets_what_is_dropped(bench: Bench, what: str) -> None:
    """A lookup after the drop would hit in no size of cache."""
    reference = image_url()
    images = await bench.resolve([reference], salt="one")
    await bench.resolver.drop(selecting(reference, images)[what])
    images.release()
    (await bench.resolve([image_url()], salt="one")).release()
    assert [point.hit_ratio for point in bench.what_if.curve().points] == [0, 0, 0, 0]


async def test_an_image_goes_for_every_salt_and_every_setting_and_no_other_image(bench: Bench) -> None:
    reference, other = image_url(), image_url()
    ways = [(None, ""), ("one", ""), (None, "many")]
    (await bench.resolve([other])).release()
    for salt, variant in ways:
        (await bench.resolve([reference], salt=salt, variant=variant)).release()
    assert len(bench.cache.keys()) == 1 + len(ways)
    report = await bench.resolver.drop(DropRequest(content=content_of(reference).hex()))
    assert report.entries == len(ways)
    for salt, variant in ways:
        again = await bench.resolve([reference], salt=salt, variant=variant)
        assert again.misses == 1
        again.release()
    kept = await bench.resolve([other])
    assert kept.hits == 1
    kept.release()


async def test_the_control_endpoint_answers_drops(bench: Bench) -> None:
    control = Control(bench.resolver.drop)
    (await bench.resolve([image_url()])).release()

    async def ask(payload: object) -> dict[str, object]:
        (answer,) = [answer async for answer in control.handle(payload, Context())]
        return dict(answer)

    assert parse(DropReport, await ask(EVERYTHING.model_dump())).entries == 1


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"key": "0" * 64, "everything": True},
        {"key": "A" * 64},
        {"tag": "00"},
        {"command": "stop"},
        {"content": "00"},
    ],
)
async def test_any_other_control_request_is_refused_and_drops_nothing(bench: Bench, payload: object) -> None:
    (await bench.resolve([image_url()])).release()
    control = Control(bench.resolver.drop)
    (answer,) = [answer async for answer in control.handle(payload, Context())]
    assert answer["status"] == "error"
    assert answer["code"] == "protocol_mismatch"
    assert len(bench.cache.keys()) == 1


def test_the_control_endpoint_stands_beside_the_workers_own() -> None:
    assert control_path("dyn://prod.pd.generate") == "prod.pd.control"


def test_a_salts_tag_tells_salts_apart_and_not_what_they_are() -> None:
    tags = {salt_tag(salt) for salt in ("one", "two", "", "one ")}
    assert len(tags) == 4
    assert all(len(tag) == 16 for tag in tags)
    assert b"one" not in salt_tag("one")
    assert salt_tag("one") == salt_tag("one")
