"""Work in another thread, and what becomes of it when its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


async def in_thread(
    work: Callable[[], T], *, undo: Callable[[T], None], executor: Executor | None = None
) -> T:
    """Run `work` in a thread of `executor` (default: the loop's own) and return its result.

    A thread cannot be cancelled: when the caller is, `undo` is called with the result as soon as
    there is one, on the event loop, so that a lease or reservation without a taker is released.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, work)

    def undo_result(done: asyncio.Future[T]) -> None:
        if not done.cancelled() and done.exception() is None:
            undo(done.result())

    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(undo_result)
        raise
    finally:
        # An error's traceback leads to this frame, and the future to the error: a cycle would keep what
        # the frames above hold, megabytes of a request, until the garbage collector runs.
        del future


def shielded(outcome: Future[T]) -> asyncio.Future[T]:
    """Return what awaits another thread's `outcome`; when the caller is cancelled, that is left alone.

    An error that it ends with afterwards is nobody's: `asyncio.shield` would have it logged as one that was
    never retrieved. Keep no reference to either in a frame that such an error's traceback leads to.
    """
    waiting = asyncio.wrap_future(outcome)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    return asyncio.shield(waiting)
