"""Answers that are worked out in a task of their own, and survive being dropped in the middle.

When nobody takes an answer any more, Dynamo 1.6.1 drops the handler's generator where it yields: in a
thread of its runtime that has no event loop. Python then runs the generator's `finally` blocks there, and
the first `await` in one of them fails; an engine's request, its leases and the log line of the request
were lost with it. A cancelled request ended that way in about one of three runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_End = asyncio.Future[None]

_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps only weak references to tasks."""


async def detached(stream: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yield what `stream` yields, and raise what it raises; a task iterates over it and closes it.

    This generator itself awaits nothing while it is closed, so it may be closed or dropped anywhere, also
    in a thread without an event loop: the task is then cancelled, and `stream` ends in the loop that it
    began in. Who needs to know when it has ended must be told by `stream`.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[T | _End] = asyncio.Queue()
    task = loop.create_task(_pump(stream, items), name="answer")
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        while not isinstance(item := await items.get(), asyncio.Future):
            yield item
        item.result()
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)


async def _pump(stream: AsyncGenerator[T], items: asyncio.Queue[T | _End]) -> None:
    end: _End = asyncio.get_running_loop().create_future()
    try:
        async with aclosing(stream):
            async for item in stream:
                items.put_nowait(item)
    except Exception as error:  # noqa: BLE001 - it is raised where the answer is read
        end.set_exception(error)
        # Where nobody reads any more there is nobody to tell; `stream` has logged what it had to.
        end.exception()
    else:
        end.set_result(None)
    items.put_nowait(end)
