"""Misses of an aggregated worker: filled by the engine, committed once right, passed on where a request goes.

The engine here is the tests' hands (`own_tower_bench`); tests/vllm has the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry

from tests.tiers.bench import until
from tests.tiers.own_tower_bench import WIDTH, TowerBench, fill, image_of, tensor_of
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import IntegrityError, InvalidImageError, LoadAbortedError
from trtllm_mm_cache.settings import TierSettings
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.configured import stored_tiers
from trtllm_mm_cache.tiers.filling import HeldFilling

IMAGE = image_of(1)
ROW_BYTES = WIDTH * 4


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[TowerBench]:
    bench = TowerBench()
    yield bench
    await closed(bench)


async def closed(bench: TowerBench) -> None:
    """End it: nothing of any request is left, in the cache, among the claims, or counted as waiting."""
    await bench.settled()
    statistics = bench.cache.statistics()
    assert (statistics.reservations, statistics.leased_entries, statistics.withdrawn_bytes) == (0, 0, 0)
    assert bench.tower.claims.in_flight == bench.tower.claims.waiters == 0
    assert (bench.waiting.items, bench.waiting.nbytes) == (0, 0)
    bench.cache.check_integrity()
    await bench.tower.close()
    bench.cache.close()


async def waiters(bench: TowerBench, count: int) -> None:
    while bench.tower.claims.waiters != count:
        await asyncio.sleep(0)


async def test_what_the_engine_fills_becomes_an_entry(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    assert not bench.cache.peek(held.key), "not before it is filled"
    made = fill(held)
    assert not bench.cache.peek(held.key), "nor before the first token"
    held.first_token()
    await bench.settled()
    held.release()
    with bench.cache.lease(held.key) as lease:  # type: ignore[union-attr]
        assert torch.equal(lease.tensor, made)
        assert lease.metadata.placeholder == "<image>" * 8
        assert lease.metadata.checksum is not None


async def test_the_capacity_holds_to_the_byte_with_every_column_counted() -> None:
    """Three images of 8 rows fit exactly; Dynamo's connector would count a quarter of each."""
    bench = TowerBench(capacity=3 * 8 * ROW_BYTES)
    for seed in range(5):
        held = await bench.miss(image_of(seed))
        fill(held)
        held.first_token()
        await bench.settled()
        held.release()
        assert bench.cache.statistics().current_bytes <= bench.capacity
    assert bench.cache.statistics().current_bytes == bench.capacity
    await closed(bench)


async def test_all_who_wait_get_leases_on_what_one_fills(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    asking = [asyncio.create_task(bench.find(IMAGE)) for _ in range(63)]
    await waiters(bench, 63)
    assert bench.waiting.nbytes == held.prepared.nbytes, "those who wait hold nothing"
    made = fill(held)
    held.first_token()
    found = await asyncio.gather(*asking)
    assert bench.engine.prepared == 1
    for lease in found:
        assert isinstance(lease, Lease)
        assert torch.equal(lease.tensor, made)
        lease.release()
    held.release()


async def test_one_of_those_who_wait_takes_over_when_the_request_goes(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    asking = [asyncio.create_task(bench.find(IMAGE)) for _ in range(3)]
    await waiters(bench, 3)
    held.release()
    await waiters(bench, 2)
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    (next_one,) = (task.result() for task in done)
    assert isinstance(next_one, HeldFilling)
    assert bench.engine.prepared == 1, "what was prepared is used again"
    fill(next_one)
    next_one.first_token()
    others = [await task for task in asking if task not in done]
    assert all(isinstance(each, Lease) for each in others)
    for each in (*others, next_one):
        each.release()


async def test_what_was_filled_is_kept_although_its_request_goes(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    waiting = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    fill(held)
    held.release()
    lease = await waiting
    assert isinstance(lease, Lease)
    lease.release()
    assert bench.cache.peek(held.key)


async def test_the_extent_is_kept_until_the_engine_is_done(bench: TowerBench) -> None:
    """vLLM answers from its own caches, and would encode after all if it preempted the request."""
    held = await bench.miss(IMAGE)
    engines = held.clone()
    held.first_token()
    held.release()
    assert bench.cache.statistics().reservations == 1, "the engine may still write there"
    fill(engines)
    engines.release()
    await bench.settled()
    assert bench.cache.peek(held.key)


async def test_who_waits_goes_on_alone_when_the_engine_had_it(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    asking = [asyncio.create_task(bench.find(IMAGE)) for _ in range(3)]
    await waiters(bench, 3)
    held.first_token()
    found = await asyncio.gather(*asking)
    assert all(isinstance(each, HeldFilling) and each.fill is None for each in found)
    for each in (*found, held):
        each.release()
    assert not bench.cache.peek(held.key)


@pytest.mark.parametrize("wrong", ["checksum", "nan"])
async def test_what_is_wrong_is_not_kept(
    bench: TowerBench, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    held = await bench.miss(IMAGE)
    waiting = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    fill(held, checksum=1) if wrong == "checksum" else fill(held, tensor_of(held, float("nan")))
    held.first_token()
    alone = await waiting
    assert isinstance(alone, HeldFilling)
    assert alone.fill is None
    assert bench.cache.statistics().reservations == 1, "the request may still use it"
    held.release()
    alone.release()
    assert not bench.cache.peek(held.key)
    assert bench.tower.checks.refused == 1
    assert "is not kept" in caplog.text


async def test_another_fillings_mark_says_nothing(bench: TowerBench) -> None:
    first = await bench.miss(IMAGE)
    fill(first)
    first.first_token()
    await bench.settled()
    first.release()
    second = await bench.miss(image_of(2))
    assert second.fill is not None
    assert first.fill is not None
    assert second.fill.mark == first.fill.mark, "the place is used again"
    assert not second.filled
    fill(first)  # a late writer with an old number
    assert not second.filled
    second.release()


async def test_what_is_larger_than_the_cache_is_served_uncached() -> None:
    bench = TowerBench(capacity=4 * ROW_BYTES)
    held, second = [await bench.miss(IMAGE) for _ in range(2)]
    assert held.fill is second.fill is None
    assert bench.tower.uncached == 2
    held.release()
    second.release()
    await closed(bench)


async def test_where_every_byte_is_in_use_it_is_served_uncached_and_nobody_waits() -> None:
    bench = TowerBench(capacity=8 * ROW_BYTES)
    first = await bench.miss(IMAGE)
    found = await asyncio.gather(*(bench.miss(image_of(2)) for _ in range(3)))
    assert all(each.fill is None for each in found)
    for each in (first, *found):
        each.release()
    await closed(bench)


async def test_who_fills_does_not_wait(bench: TowerBench) -> None:
    """Two requests with the same two images in the other order would wait for each other."""
    one, other = set[str](), set[str]()
    async with asyncio.timeout(10):
        first = await bench.miss(image_of(1), filling=one)
        second = await bench.miss(image_of(2), filling=other)
        crossed = await asyncio.gather(
            bench.miss(image_of(2), filling=one), bench.miss(image_of(1), filling=other)
        )
    assert all(each.fill is None for each in crossed)
    for each in (first, second, *crossed):
        each.release()


async def test_the_same_image_twice_in_a_request_is_filled_once(bench: TowerBench) -> None:
    filling = set[str]()
    async with asyncio.timeout(10):
        first, second = [await bench.miss(IMAGE, filling=filling) for _ in range(2)]
    assert first.fill is not None
    assert second.fill is None
    assert second.prepared is first.prepared
    first.release()
    second.release()


async def test_a_drop_meanwhile_is_waited_for_and_nothing_is_kept(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    waiting = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    dropping = asyncio.create_task(bench.drop_all())
    await asyncio.sleep(0)
    fill(held)
    held.first_token()
    lease = await waiting
    assert isinstance(lease, Lease), "it is served"
    lease.release()
    held.release()
    assert await dropping == 0
    assert not bench.cache.peek(held.key)


async def test_what_may_not_be_kept_claims_nothing(bench: TowerBench) -> None:
    scope = Scope.of(None, require_salt=True)
    first, second = [await bench.miss(IMAGE, scope=scope) for _ in range(2)]
    assert first.fill is second.fill is None
    first.release()
    second.release()


async def test_an_image_that_the_model_refuses_is_refused_to_all(bench: TowerBench) -> None:
    bench.engine.preparing.clear()
    broken = image_of(3, height=13)
    asking = [asyncio.create_task(bench.find(broken)) for _ in range(3)]
    await waiters(bench, 2)
    bench.engine.preparing.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in results] == [InvalidImageError] * 3
    assert bench.engine.prepared == 1


async def test_who_goes_while_the_image_is_prepared_is_followed_by_the_next(
    bench: TowerBench,
) -> None:
    bench.engine.preparing.clear()
    first = asyncio.create_task(bench.find(IMAGE))
    while not bench.engine.prepared:
        await asyncio.sleep(0)
    second = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    first.cancel()
    await asyncio.wait([first])
    bench.engine.preparing.set()
    held = await second
    assert isinstance(held, HeldFilling)
    assert held.fill is not None
    held.release()


async def test_who_waits_too_long_goes_on_alone() -> None:
    bench = TowerBench(wait_s=0.05)
    held = await bench.miss(IMAGE)
    alone = await bench.miss(IMAGE)
    assert alone.fill is None
    held.release()
    alone.release()
    await closed(bench)


async def test_a_waiter_that_is_cancelled_as_its_lease_comes_releases_it(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    waiting = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    lease = bench.cache.reserve("x", 64, owner="test").commit(dtype=torch.uint8, shape=(64,))
    claim = bench.tower.claims.get(held.key)
    assert claim is not None
    claim.land(lease)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    lease.release()
    assert bench.cache.statistics().leased_entries == 0
    held.release()


async def test_closing_refuses_who_waits(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    waiting = asyncio.create_task(bench.find(IMAGE))
    await waiters(bench, 1)
    await bench.tower.close()
    with pytest.raises(LoadAbortedError):
        await waiting
    held.release()


async def test_there_is_nothing_to_read_yet(bench: TowerBench) -> None:
    held = await bench.miss(IMAGE)
    with pytest.raises(IntegrityError, match="no tensor yet"):
        _ = held.tensor
    with pytest.raises(IntegrityError, match="cannot be read yet"):
        held.handle()
    held.release()
    held.release()


def disk(folder: Path) -> StoredTiers:
    """A disk tier that stores at the first use."""
    settings = TierSettings(
        multimodal_embedding_cache_disk_path=folder, multimodal_embedding_cache_store_at_use=1
    )
    return stored_tiers(settings, "f" * 64, CollectorRegistry(), arenas=[1 << 20])


async def test_what_lies_on_disk_is_not_encoded_again(folder: Path) -> None:
    """Another worker, later: the disk has what the first one's tower made, for all who ask at once."""
    first = TowerBench(stored=disk(folder))
    held = await first.miss(IMAGE)
    made = fill(held)
    held.first_token()
    await first.settled()
    held.release()
    (tier,) = first.stored._tiers
    await until(lambda: tier.offers.outcomes["stored"] == 1)
    await closed(first)

    bench = TowerBench(stored=disk(folder))
    for lease in await asyncio.gather(*(bench.find(IMAGE) for _ in range(5))):
        assert isinstance(lease, Lease)
        assert torch.equal(lease.tensor, made)
        lease.release()
    assert (bench.engine.prepared, bench.tower.claims.started) == (0, 1)
    (await bench.miss(image_of(2))).release()  # the disk has one image
    await closed(bench)


async def test_no_room_for_what_lies_on_disk_is_an_encode(folder: Path) -> None:
    first = TowerBench(stored=disk(folder))
    held = await first.miss(IMAGE)
    fill(held)
    held.first_token()
    await first.settled()
    held.release()
    (tier,) = first.stored._tiers
    await until(lambda: tier.offers.outcomes["stored"] == 1)
    await closed(first)

    bench = TowerBench(capacity=8 * ROW_BYTES - 1, stored=disk(folder))
    again = await bench.miss(IMAGE)
    assert again.fill is None
    again.release()
    await closed(bench)
