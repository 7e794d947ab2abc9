"""Requests that Dynamo hands to a handler: whether one is still wanted, and answers that outlive it.

When no caller takes an answer any more, Dynamo 1.6.1 drops the handler's generator where it yields: in a
thread of its runtime that has no event loop. Python then runs the generator's `finally` blocks there, and
the first `await` in one of them fails; an engine's request, its leases and the log line of the request
were lost with it. A cancelled request ended that way in about one of three runs.

A token passes one queue on its way and costs no task: what watches for the caller's leaving is one task a
request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

Emit = Callable[[T], None]
"""Hands one output to whoever reads the answer; never waits."""

_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps only weak references to tasks."""


class Stoppable(Protocol):
    """Something whose answer may become unwanted."""

    def async_killed_or_stopped(self) -> Awaitable[Any]:
        """Wait until no answer is wanted any more."""
        ...


class RequestContext(Stoppable, Protocol):
    """What Dynamo's `Context` tells of one request."""

    def id(self) -> str | None:
        """The request's id."""
        ...

    def is_stopped(self) -> bool:
        """Whether no answer is wanted any more."""
        ...

    def trace_headers(self) -> Mapping[str, str] | None:
        """W3C trace headers of the caller, where it sent some."""
        ...


class RequestStoppedError(Exception):
    """The client is gone or has cancelled: nothing reads the answer."""


@asynccontextmanager
async def stopped_with(context: Stoppable, *others: asyncio.Future[Any]) -> AsyncIterator[None]:
    """Run a block no longer than its answer is wanted.

    When the request is stopped or killed, or one of `others` is done, the block is cancelled where it waits,
    and `RequestStoppedError` is raised when it has ended.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - an asynchronous context manager runs in a task
    fired = False

    def stop(_: asyncio.Future[Any]) -> None:
        nonlocal fired
        if not fired:
            fired = True
            task.cancel()

    stopped = asyncio.ensure_future(context.async_killed_or_stopped())
    for reason in (stopped, *others):
        reason.add_done_callback(stop)
    try:
        yield
    except asyncio.CancelledError as cancelled:
        # As asyncio.timeout does: a cancellation that came from elsewhere too goes on.
        if fired and task.uncancel() == 0:
            # contextlib's frame keeps what it threw in here; from Python 3.12 the traceback of that leads
            # back to the frame and to the whole call: a cycle that only the collector would end.
            cancelled.__traceback__ = None
            raise RequestStoppedError from None
        raise
    finally:
        for reason in (stopped, *others):
            reason.remove_done_callback(stop)
        stopped.cancel()


@dataclass(frozen=True)
class _End:
    """The answer is over; `error` is to be raised where it is read."""

    error: Exception | None = None


async def detached(answer: Callable[[Emit[T]], Awaitable[None]]) -> AsyncGenerator[T]:
    """Yield what `answer` emits, and raise what it raises; it runs in a task of its own.

    This generator itself awaits nothing while it is closed, so it may be closed or dropped anywhere, also
    in a thread without an event loop: the task is then cancelled, and `answer` ends in the loop that it
    began in. Who needs to know when it has ended must be told by `answer`, which has logged what it had to:
    of what it raises only the exception itself is passed on, without traceback and causes, because those
    would keep the request's bytes alive for as long as the exception is kept anywhere.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[T | _End] = asyncio.Queue()
    task = loop.create_task(_run(answer, items), name="answer")
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        while not isinstance(item := await items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        item = _End()  # the exception's traceback has this frame: it must not lead back to the exception
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)


async def _run(answer: Callable[[Emit[T]], Awaitable[None]], items: asyncio.Queue[T | _End]) -> None:
    end = _End()
    try:
        await answer(items.put_nowait)
    except Exception as error:  # noqa: BLE001 - it is raised where the answer is read
        error.__traceback__ = error.__cause__ = error.__context__ = None
        end = _End(error)
    items.put_nowait(end)
