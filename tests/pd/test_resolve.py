"""The flow of a miss when the other side misbehaves, with real NIXL between two agents.

The peer encode worker here stands on the same interface as the product's client of it; what it
announces can be changed per call, what it exports is real.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.e2e.stack import data_url, new_image, png
from tests.pd.bench import (
    ENCODE_SECONDS,
    NBYTES,
    ROWS,
    WIDTH,
    Bench,
    asking,
    assert_holds,
    image_url,
    pd_settings,
)
from trtllm_mm_cache.errors import (
    ArenaFullError,
    ChecksumMismatchError,
    EmbeddingMismatchError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    InvalidImageError,
    InvalidRequestError,
    MediaReferenceError,
    MmCacheError,
    ProtocolMismatchError,
    TransferError,
    UnsupportedMediaError,
)


async def test_a_miss_then_a_hit(bench: Bench) -> None:
    reference = image_url()
    first = await bench.resolve([reference])
    second = await bench.resolve([reference])
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    assert_holds(second.leases[0])
    assert second.leases[0].address == first.leases[0].address
    assert second.leases[0].metadata.encode_seconds == ENCODE_SECONDS
    assert bench.peer.calls == [1]
    first.release()
    second.release()


async def test_leases_stand_in_prompt_order(bench: Bench) -> None:
    references = [image_url(), image_url(), image_url()]
    alone = [await bench.resolve([reference]) for reference in references]
    order = [2, 0, 2, 1, 0]
    together = await bench.resolve([references[index] for index in order])
    assert [lease.key for lease in together.leases] == [alone[index].leases[0].key for index in order]
    for resolved in [*alone, together]:
        resolved.release()


async def test_one_content_under_two_references_is_one_call(bench: Bench) -> None:
    body = png(new_image(32, 32))
    images = await bench.resolve([data_url(body), data_url(body).replace("image/png", "image/x-png")])
    assert len(bench.peer.calls) == 1
    assert images.leases[0].key == images.leases[1].key
    images.release()


async def test_many_requests_at_once_are_one_call(bench: Bench) -> None:
    reference = image_url()
    bench.peer.gate.clear()
    requests = [asyncio.create_task(bench.resolve([reference])) for _ in range(16)]
    while bench.tiers.flights.waiters < 16:
        await asyncio.sleep(0)
    bench.peer.gate.set()
    resolved = await asyncio.gather(*requests)
    assert bench.peer.calls == [1]
    for images in resolved:
        assert_holds(images.leases[0])
        images.release()


async def test_a_cancelled_request_does_not_take_the_flight_from_another(bench: Bench) -> None:
    reference = image_url()
    bench.peer.gate.clear()
    first, second = (asyncio.create_task(bench.resolve([reference])) for _ in range(2))
    while bench.tiers.flights.waiters < 2:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    bench.peer.gate.set()
    images = await second
    assert_holds(images.leases[0])
    images.release()


async def test_the_last_one_leaving_ends_the_flight(bench: Bench) -> None:
    bench.peer.gate.clear()
    request = asyncio.create_task(bench.resolve([image_url(), image_url()]))
    while len(bench.peer.calls) < 2:
        await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert bench.tiers.flights.in_flight == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda answer: answer | {"checksum": answer["checksum"] ^ 1}, ChecksumMismatchError),
        (lambda answer: answer | {"shape": (ROWS + 1, WIDTH)}, EmbeddingMismatchError),
        (lambda answer: answer | {"dtype": "float16"}, EmbeddingMismatchError),
        (lambda answer: answer | {"dtype": "complex"}, EmbeddingMismatchError),
        (lambda answer: answer | {"peer": {**answer["peer"], "digest": "0" * 64}}, TransferError),
        (lambda answer: answer | {"address": 4096}, TransferError),
        (EncodeUnavailableError("gone"), EncodeUnavailableError),
    ],
    ids=["checksum", "shape", "dtype", "unknown-dtype", "metadata", "address", "gone"],
)
async def test_a_bad_answer_is_retried_once_on_the_other_worker_and_never_cached(
    bench: Bench, change: Any, error: type[MmCacheError]
) -> None:
    bench.peer.changes = [change]
    images = await bench.resolve([image_url()])
    assert_holds(images.leases[0])
    assert bench.peer.calls == [1, 2]
    assert bench.tier.retries == 1
    images.release()

    bench.peer.calls.clear()
    bench.peer.changes = [change, change]
    reference = image_url()
    with pytest.raises(error, match="image 1"):
        await bench.resolve([reference])
    assert bench.peer.calls == [1, 2]
    assert bench.held() == (0, 0, 0)
    assert len(bench.cache.keys()) == 1, "only the first picture may be cached"
    healed = await bench.resolve([reference])
    assert_holds(healed.leases[0])
    healed.release()


@pytest.mark.parametrize("field", ["fingerprint", "key"])
async def test_an_embedding_of_another_model_or_image_is_never_read(bench: Bench, field: str) -> None:
    bench.peer.changes = [lambda answer: answer | {field: "cd" * 32}] * 2
    with pytest.raises(ProtocolMismatchError, match="image 1"):
        await bench.resolve([image_url()])
    assert bench.peer.calls == [1, 2], "another worker may run the right model"
    assert bench.reader.completed == 0
    assert bench.held() == (0, 0, 0)
    assert bench.cache.keys() == []


async def test_a_clients_mistake_is_not_retried(bench: Bench) -> None:
    bench.peer.changes = [InvalidImageError("truncated")]
    with pytest.raises(InvalidImageError, match="image 1: truncated"):
        await bench.resolve([image_url()])
    assert bench.peer.calls == [1]


async def test_no_encode_worker_costs_only_misses(bench: Bench) -> None:
    cached = image_url()
    (await bench.resolve([cached])).release()
    bench.peer.instances = []
    with pytest.raises(EncodeUnavailableError) as caught:
        await bench.resolve([image_url()])
    assert caught.value.http_status == 503
    (await bench.resolve([cached])).release()


@pytest.mark.parametrize("settings", [pd_settings(encode_timeout_s=0.05)])
async def test_an_encode_worker_that_never_answers_meets_the_deadline(bench: Bench) -> None:
    bench.peer.gate.clear()
    with pytest.raises(EncodeTimeoutError):
        await bench.resolve([image_url()])


async def test_a_cache_full_of_leased_entries_serves_uncached(bench: Bench) -> None:
    held = [await bench.resolve([image_url()]) for _ in range(4)]
    extra = await bench.resolve([image_url()])
    assert_holds(extra.leases[0])
    assert bench.receiver.uncached == 1
    assert extra.leases[0].key not in bench.cache.keys()
    another = await bench.resolve([image_url()])
    with pytest.raises(ArenaFullError):
        await bench.resolve([image_url()])
    for images in [*held, extra, another]:
        assert_holds(images.leases[0])
        images.release()
    again = await bench.resolve([image_url()])
    assert bench.receiver.uncached == 2
    again.release()


async def test_a_request_that_can_never_fit_is_refused_and_not_to_be_retried(bench: Bench) -> None:
    """The cache has room for 4 and the transit arena for 2: seven embeddings of one request fit nowhere."""
    references = [image_url() for _ in range(7)]
    for _ in range(2):  # with no image cached, and with some
        with pytest.raises(InvalidRequestError, match="--transfer-arena-mb and --multimodal-embedding-cache"):
            await bench.resolve(references)
        await bench.nothing_held()
    (await bench.resolve(references[:6])).release()


async def test_a_request_that_fits_when_others_have_gone_is_to_be_retried(bench: Bench) -> None:
    held = [await bench.resolve([image_url()]) for _ in range(3)]
    references = [image_url() for _ in range(6)]
    with pytest.raises(ArenaFullError):
        await bench.resolve(references)
    for images in held:
        images.release()
    # A thread that had begun to reserve for the one that failed may do so even now, and releases it then.
    async with asyncio.timeout(15):
        while True:
            try:
                (await bench.resolve(references)).release()
            except ArenaFullError:
                await bench.nothing_held()
            else:
                break


async def test_what_counts_is_a_requests_own_images(bench: Bench) -> None:
    """Another request's flight that found no room says nothing of who joined it."""
    bench.peer.gate.clear()
    shared = image_url()
    several = [*[image_url() for _ in range(6)], shared]
    large = asyncio.ensure_future(bench.resolve(several))
    async with asyncio.timeout(5):
        while len(bench.peer.calls) < 7:
            await asyncio.sleep(0.001)
    small = asyncio.ensure_future(bench.resolve([shared]))
    await asyncio.sleep(0)
    bench.peer.gate.set()
    with pytest.raises(InvalidRequestError):
        await large
    await asyncio.wait({small})
    failure = small.exception()
    if failure is None:
        small.result().release()
    assert failure is None or isinstance(failure, ArenaFullError)


async def test_one_bad_reference_releases_the_good_ones_and_is_named(bench: Bench) -> None:
    good = image_url()
    (await bench.resolve([good])).release()
    with pytest.raises(MediaReferenceError, match="image 2"):
        await bench.resolve([good, "gopher://x", image_url()])
    with pytest.raises(UnsupportedMediaError, match="image 1"):
        await bench.resolve(["data:text/plain;base64,aGVsbG8=", good])
    await bench.nothing_held()


async def test_salt_variant_and_kwargs_enter_the_key(bench: Bench) -> None:
    reference = image_url()

    async def key(**changes: Any) -> str:
        variant = changes.pop("variant", "")
        images = await bench.resolver.resolve(asking([reference], **changes), variant=variant)
        images.release()
        return images.leases[0].key

    keys = [
        await key(),
        await key(salt="tenant"),
        await key(variant="multi"),
        await key(processor_kwargs={"max_pixels": 9}),
    ]
    assert len(set(keys)) == 4
    assert await key() == keys[0]


salt_required = pytest.mark.parametrize("require_salt", [True], ids=["salt-required"])


@salt_required
@pytest.mark.parametrize("salt", [None, ""])
async def test_an_unsalted_request_is_served_past_the_cache_and_leaves_nothing(
    bench: Bench, salt: str | None
) -> None:
    reference = image_url()
    keys = set()
    for _ in range(2):
        images = await bench.resolve([reference, reference], salt=salt)
        assert (images.hits, images.misses) == (0, 1)
        for lease in images.leases:
            assert_holds(lease)
            keys.add(lease.key)
        assert bench.transit.statistics().leased_bytes == NBYTES
        images.release()
        assert bench.transit.statistics().arena.used_bytes == 0
    assert len(keys) == 2, "two requests shared a key"
    assert (len(bench.peer.calls), bench.peer.retained) == (2, [False, False])
    assert bench.receiver.uncached == 2
    statistics = bench.cache.statistics()
    assert (statistics.entries, statistics.hits, statistics.misses) == (0, 0, 0), "the cache was touched"
    assert bench.what_if.curve().lookups == 0


@salt_required
async def test_unsalted_requests_do_not_share_a_flight(bench: Bench) -> None:
    reference = image_url()
    bench.peer.gate.clear()
    requests = [asyncio.create_task(bench.resolve([reference])) for _ in range(2)]
    while len(bench.peer.calls) < 2:
        await asyncio.sleep(0)
    assert bench.tiers.flights.joined == 0
    bench.peer.gate.set()
    for images in await asyncio.gather(*requests):
        assert_holds(images.leases[0])
        images.release()


@salt_required
async def test_salted_requests_share_as_ever_and_an_unsalted_one_does_not_see_it(bench: Bench) -> None:
    reference = image_url()
    outcomes = []
    for salt in ("tenant", "tenant", None, "tenant", "other"):
        images = await bench.resolve([reference], salt=salt)
        outcomes.append((images.hits, images.misses))
        images.release()
    assert outcomes == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
    assert bench.peer.retained == [True, False, True]
    assert len(bench.cache.keys()) == 2


@salt_required
async def test_unsalted_requests_end_at_the_transit_arena(bench: Bench) -> None:
    held = [await bench.resolve([image_url()]) for _ in range(2)]
    with pytest.raises(ArenaFullError):
        await bench.resolve([image_url()])
    for images in held:
        images.release()
    (await bench.resolve([image_url()])).release()
    assert bench.cache.keys() == []


@salt_required
async def test_images_that_may_not_be_cached_have_the_transit_arena_alone(bench: Bench) -> None:
    with pytest.raises(InvalidRequestError, match=r"\(--transfer-arena-mb\)"):
        await bench.resolve([image_url() for _ in range(3)])


async def test_the_what_if_curve_follows_the_look_ups(bench: Bench) -> None:
    """The cache holds 4 embeddings; 6 in turn hit only where twice as many fit."""
    references = [image_url() for _ in range(6)]
    for _ in range(2):
        for reference in references:
            (await bench.resolve([reference])).release()
    curve = bench.what_if.curve()
    assert curve.lookups == 12
    assert [point.hit_ratio for point in curve.points] == [0, 0, 0.5, 0.5]
