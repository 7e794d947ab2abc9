"""Micro-batches: who shares one, and what a failure or a cancelled caller does to the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.encode.batcher import MicroBatcher
from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.errors import EncodeFailedError, InvalidImageError, MmCacheError


class Tower:
    """A tower whose batches can be looked at and held back; an item that is an error fails."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()

    def encode(self, batch: Sequence[Any]) -> list[EncodedItem | MmCacheError]:
        self.batches.append(list(batch))
        self.entered.release()
        assert self.open.wait(30)
        if "break" in batch:
            raise RuntimeError("out of memory")
        if "lose" in batch:
            return []
        return [
            item
            if isinstance(item, MmCacheError)
            else EncodedItem(torch.full((1, 1), float(item)), EmbeddingMetadata())
            for item in batch
        ]

    async def until_entered(self) -> None:
        """Wait for the next batch to be in the tower."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
async def batcher(tower: Tower) -> AsyncIterator[MicroBatcher]:
    batcher = MicroBatcher(tower.encode, max_items=4, registry=CollectorRegistry())
    yield batcher
    tower.open.set()
    await batcher.close()


async def begin(batcher: MicroBatcher, *items: Any) -> list[asyncio.Task[Any]]:
    """Submit `items`, in order."""
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def outcomes(batcher: MicroBatcher, *items: Any) -> list[Any]:
    return await asyncio.gather(*await begin(batcher, *items), return_exceptions=True)


async def test_an_idle_tower_starts_and_what_comes_meanwhile_is_the_next_batch(
    batcher: MicroBatcher, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clock takes part: one that is asked to wait here fails the test."""

    def wait(*_: Any, **__: Any) -> Any:
        pytest.fail("a timer was set")

    tower.open.clear()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", wait)
    monkeypatch.setattr(loop, "call_at", wait)
    tasks = await begin(batcher, 1)
    await tower.until_entered()
    for item in (2, 3):
        tasks += await begin(batcher, item)
    assert (tower.batches, batcher.queued) == ([[1]], 2)
    tower.open.set()
    results = await asyncio.gather(*tasks)
    assert tower.batches == [[1], [2, 3]]
    assert [result.item.tensor.item() for result in results] == [1, 2, 3]
    assert (batcher.batches, batcher.items, batcher.queued) == (2, 3, 0)
    await batcher.submit(4)
    assert tower.batches[2:] == [[4]], "idle again, it starts again"


async def test_items_that_come_in_one_turn_share_a_batch(batcher: MicroBatcher, tower: Tower) -> None:
    await outcomes(batcher, 1, 2, 3)
    assert tower.batches == [[1, 2, 3]]


async def test_a_batch_is_no_larger_than_the_limit(batcher: MicroBatcher, tower: Tower) -> None:
    tower.open.clear()
    tasks = await begin(batcher, 0)
    await tower.until_entered()
    tasks += await begin(batcher, *range(1, 11))
    tower.open.set()
    await asyncio.gather(*tasks)
    assert tower.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


async def test_one_bad_item_does_not_spoil_its_batch(batcher: MicroBatcher, tower: Tower) -> None:
    results = await outcomes(batcher, 1, InvalidImageError("broken"), 3)
    assert len(tower.batches) == 1
    assert isinstance(results[1], InvalidImageError)
    assert [results[0].item.tensor.item(), results[2].item.tensor.item()] == [1, 3]
    assert (batcher.items, batcher.failures) == (2, 1)


@pytest.mark.parametrize("trouble", ["break", "lose"])
async def test_a_tower_that_fails_fails_its_batch_and_not_the_next(
    batcher: MicroBatcher, trouble: str
) -> None:
    one, other = await outcomes(batcher, 1, trouble)
    assert [type(one), type(other)] == [EncodeFailedError, EncodeFailedError]
    assert one is not other, "each is raised through frames of its own caller"
    assert "out of memory" not in str(one)
    assert (await batcher.submit(2)).item.tensor.item() == 2


async def test_what_the_tower_raised_is_in_the_log(
    batcher: MicroBatcher, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EncodeFailedError, match="RuntimeError"):
        await batcher.submit("break")
    assert 'raise RuntimeError("out of memory")' in caplog.text


async def test_a_cancelled_caller_takes_its_item_out_of_the_queue(
    batcher: MicroBatcher, tower: Tower
) -> None:
    tower.open.clear()
    tasks = await begin(batcher, 0)
    await tower.until_entered()
    tasks += await begin(batcher, 1, 2)
    tasks[1].cancel()
    tower.open.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert tower.batches == [[0], [2]]


async def test_a_caller_that_is_cancelled_while_its_item_is_encoded_spoils_nothing(
    batcher: MicroBatcher, tower: Tower
) -> None:
    tower.open.clear()
    tasks = await begin(batcher, 0, 1)
    await tower.until_entered()
    tasks[0].cancel()
    await asyncio.wait({tasks[0]})
    tower.open.set()
    assert (await tasks[1]).item.tensor.item() == 1
    assert (await batcher.submit(2)).item.tensor.item() == 2


async def test_closing_answers_those_who_wait_and_delivers_what_runs(
    batcher: MicroBatcher, tower: Tower
) -> None:
    tower.open.clear()
    (running,) = await begin(batcher, 1)
    await tower.until_entered()
    (waiting,) = await begin(batcher, 2)
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(EncodeFailedError, match="shutting down"):
        await waiting
    with pytest.raises(EncodeFailedError, match="shutting down"):
        await batcher.submit(3)
    tower.open.set()
    await closing
    assert (await running).item.tensor.item() == 1
