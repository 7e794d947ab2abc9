"""Micro-batches: who shares one, who waits, and what a failure or a cancelled caller does to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch

from trtllm_mm_cache.encode.batcher import MicroBatcher
from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.errors import EncodeFailedError, EncodeOverloadedError, InvalidImageError, MmCacheError


class Tower:
    """A tower whose batches can be looked at and held back; an item that is an error fails."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def encode(self, batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        self.batches.append(list(batch))
        self.entered.set()
        assert self.open.wait(10)
        if "break" in batch:
            raise RuntimeError("out of memory")
        return [
            item if isinstance(item, MmCacheError) else EncodedItem(torch.full((1, 1), float(item)), {})
            for item in batch
        ]


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
async def batcher(tower: Tower) -> AsyncIterator[MicroBatcher]:
    batcher = MicroBatcher(tower.encode, max_images=4, max_wait_s=0.02, max_queued=6)
    yield batcher
    tower.open.set()
    await batcher.close()


async def submit_all(batcher: MicroBatcher, items: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)


async def test_images_that_come_together_share_a_batch(batcher: MicroBatcher, tower: Tower) -> None:
    results = await submit_all(batcher, [1, 2, 3])
    assert tower.batches == [[1, 2, 3]]
    assert [result.image.tensor.item() for result in results] == [1, 2, 3]
    assert all(result.encode_seconds > 0 for result in results)


async def test_a_batch_is_no_larger_than_the_limit(batcher: MicroBatcher, tower: Tower) -> None:
    await submit_all(batcher, range(6))
    assert [len(batch) for batch in tower.batches] == [4, 2]


async def test_an_image_alone_does_not_wait_for_others_for_ever(batcher: MicroBatcher, tower: Tower) -> None:
    async with asyncio.timeout(5):
        await batcher.submit(1)
    assert tower.batches == [[1]]


async def test_one_bad_image_does_not_spoil_its_batch(batcher: MicroBatcher, tower: Tower) -> None:
    results = await submit_all(batcher, [1, InvalidImageError("broken"), 3])
    assert len(tower.batches) == 1
    assert isinstance(results[1], InvalidImageError)
    assert [results[0].image.tensor.item(), results[2].image.tensor.item()] == [1, 3]
    assert batcher.statistics().failures == 1


async def test_a_tower_that_raises_fails_its_batch_and_not_the_next(
    batcher: MicroBatcher, tower: Tower
) -> None:
    results = await submit_all(batcher, [1, "break"])
    assert [type(result) for result in results] == [EncodeFailedError, EncodeFailedError]
    assert "out of memory" not in str(results[0])
    assert (await batcher.submit(2)).image.tensor.item() == 2


async def test_more_than_the_queue_holds_is_refused_at_once(batcher: MicroBatcher, tower: Tower) -> None:
    tower.open.clear()
    running = asyncio.gather(*(batcher.submit(item) for item in range(4)))
    await asyncio.to_thread(tower.entered.wait, 10)
    queued = [asyncio.create_task(batcher.submit(item)) for item in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(EncodeOverloadedError, match="6 images"):
        await batcher.submit(99)
    tower.open.set()
    await asyncio.gather(running, *queued)


async def test_a_cancelled_caller_takes_its_image_out_of_the_queue(
    batcher: MicroBatcher, tower: Tower
) -> None:
    tower.open.clear()
    running = asyncio.create_task(batcher.submit(0))
    await asyncio.to_thread(tower.entered.wait, 10)
    waiting = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    tower.open.set()
    await asyncio.gather(running, *waiting, return_exceptions=True)
    assert tower.batches == [[0], [2]]


async def test_closing_answers_those_who_wait_and_delivers_what_runs(tower: Tower) -> None:
    batcher = MicroBatcher(tower.encode, max_images=1, max_wait_s=0, max_queued=8)
    tower.open.clear()
    running = asyncio.create_task(batcher.submit(1))
    await asyncio.to_thread(tower.entered.wait, 10)
    waiting = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    tower.open.set()
    await closing
    assert (await running).image.tensor.item() == 1
    with pytest.raises(EncodeFailedError, match="shutting down"):
        await waiting


async def test_a_wrong_number_of_results_is_an_error_for_all(tower: Tower) -> None:
    batcher = MicroBatcher(lambda _: [], max_images=2, max_wait_s=0.01, max_queued=8)
    results = await submit_all(batcher, [1, 2])
    assert [type(result) for result in results] == [EncodeFailedError, EncodeFailedError]
    await batcher.close()
