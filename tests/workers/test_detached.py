"""An answer whose reader vanishes, in whatever thread, ends in the loop that it began in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

import pytest

from trtllm_mm_cache.runtime.detached import detached

DEADLINE_S = 10.0


class Stream:
    """Counts for ever; its clean-up awaits, as an engine's does."""

    def __init__(self, fail_at: int | None = None, end_at: int | None = None) -> None:
        self.ended_in: int | None = None
        self._ended = asyncio.Event()
        self._fail_at, self._end_at = fail_at, end_at

    async def run(self) -> AsyncGenerator[int]:
        number = 0
        try:
            while number != self._end_at:
                if number == self._fail_at:
                    raise ValueError("the engine failed")
                yield number
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


async def test_items_come_in_order_and_the_stream_is_closed() -> None:
    stream = Stream(end_at=5)
    assert [number async for number in detached(stream.run())] == [0, 1, 2, 3, 4]
    assert stream.ended_in == threading.get_ident()


async def test_an_error_is_raised_after_the_items_before_it() -> None:
    stream = Stream(fail_at=3)
    answer = detached(stream.run())
    assert [await anext(answer) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the engine failed"):
        await anext(answer)
    assert stream.ended_in == threading.get_ident()


async def test_an_answer_dropped_in_a_thread_without_a_loop_ends_in_its_own() -> None:
    """As Dynamo drops a handler whose client is gone."""
    stream = Stream()
    held = [detached(stream.run())]
    assert await anext(held[0]) == 0
    dropper = threading.Thread(target=held.clear)
    dropper.start()
    await asyncio.to_thread(dropper.join, DEADLINE_S)
    assert not dropper.is_alive()
    assert await stream.ended() == threading.get_ident()


async def test_closing_and_cancelling_end_the_stream() -> None:
    stream = Stream()
    answer = detached(stream.run())
    await anext(answer)
    await answer.aclose()
    assert await stream.ended() == threading.get_ident()
    stream = Stream()

    async def read() -> None:
        async for _ in detached(stream.run()):
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    assert await stream.ended() == threading.get_ident()
