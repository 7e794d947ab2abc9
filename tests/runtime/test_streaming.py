"""An answer whose reader vanishes, in whatever thread, ends in the loop it began in; stopped requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import pytest

from trtllm_mm_cache.runtime.streaming import Emit, RequestStoppedError, detached, stopped_with

DEADLINE_S = 10.0


class Counting:
    """Counts for ever; its clean-up awaits, as an engine's does."""

    def __init__(self, fail_at: int | None = None, end_at: int | None = None) -> None:
        self.ended_in: int | None = None
        self._ended = asyncio.Event()
        self._fail_at, self._end_at = fail_at, end_at

    async def answer(self, emit: Emit[int]) -> None:
        number = 0
        try:
            while number != self._end_at:
                if number == self._fail_at:
                    raise ValueError("the engine failed")
                emit(number)
                number += 1
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            self.ended_in = threading.get_ident()
            self._ended.set()

    async def ended(self) -> int | None:
        async with asyncio.timeout(DEADLINE_S):
            await self._ended.wait()
        return self.ended_in


async def test_items_come_in_order_and_the_answer_has_ended() -> None:
    counting = Counting(end_at=5)
    assert [number async for number in detached(counting.answer)] == [0, 1, 2, 3, 4]
    assert counting.ended_in == threading.get_ident()


async def test_an_error_is_raised_after_the_items_before_it() -> None:
    counting = Counting(fail_at=3)
    answer = detached(counting.answer)
    assert [await anext(answer) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the engine failed"):
        await anext(answer)
    assert counting.ended_in == threading.get_ident()


async def test_an_answer_dropped_in_a_thread_without_a_loop_ends_in_its_own() -> None:
    """As Dynamo drops a handler whose client is gone."""
    counting = Counting()
    held = [detached(counting.answer)]
    assert await anext(held[0]) == 0
    dropper = threading.Thread(target=held.clear)
    dropper.start()
    await asyncio.to_thread(dropper.join, DEADLINE_S)
    assert not dropper.is_alive()
    assert await counting.ended() == threading.get_ident()


async def test_closing_and_cancelling_end_the_answer() -> None:
    counting = Counting()
    answer = detached(counting.answer)
    await anext(answer)
    await answer.aclose()
    assert await counting.ended() == threading.get_ident()
    counting = Counting()

    async def read() -> None:
        async for _ in detached(counting.answer):
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    assert await counting.ended() == threading.get_ident()


class Body:
    """Stands for a request's bytes."""


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("read", [True, False], ids=["read", "reader-gone"])
async def test_an_error_keeps_nothing_of_the_request(read: bool) -> None:
    """Not until the garbage collector runs, and not where the caller keeps the exception."""
    bodies: list[weakref.ref[Body]] = []

    async def fail(emit: Emit[int]) -> None:
        body = Body()
        bodies.append(weakref.ref(body))
        emit(1)
        await asyncio.sleep(0)
        raise ValueError("outer") from KeyError("inner")

    kept: Exception | None = None
    answer = detached(fail)
    assert await anext(answer) == 1
    if read:
        try:
            await anext(answer)
        except ValueError as error:
            kept = error
    else:
        await answer.aclose()
        for _ in range(3):
            await asyncio.sleep(0)
    del answer
    await asyncio.sleep(0)
    assert (kept is not None) == read
    assert bodies[0]() is None


class Request:
    """The part of Dynamo's context that is asked; `stop` is the client leaving."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    def id(self) -> str:
        return "id"

    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def trace_headers(self) -> None:
        return None

    async def async_killed_or_stopped(self) -> bool:
        return await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()


async def ticking(cleaned: list[bool]) -> AsyncGenerator[int]:
    try:
        for number in range(1_000_000):
            yield number
            await asyncio.sleep(0)
    finally:
        await asyncio.sleep(0)
        cleaned.append(True)


async def test_a_stopped_request_ends_its_block_wherever_it_waits() -> None:
    request = Request()
    cleaned: list[bool] = []

    async def count() -> None:
        async with stopped_with(request), aclosing(ticking(cleaned)) as stream:
            async for number in stream:
                if number == 3:
                    request.stop()

    with pytest.raises(RequestStoppedError):
        await count()
    assert cleaned == [True]
    await asyncio.sleep(0)  # no cancellation is left over for what comes after


async def test_a_block_that_ends_first_is_not_touched_by_a_later_stop() -> None:
    request = Request()
    async with stopped_with(request):
        await asyncio.sleep(0)
    request.stop()
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_cancellation_from_elsewhere_is_no_stop() -> None:
    request, entered = Request(), asyncio.Event()

    async def work() -> None:
        async with stopped_with(request):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
