"""A request at its beginning and end, where its reader may leave before the engine is done with it.

What is prepared in a thread, and what an engine still reads, holds leases. Neither can be stopped at once, so
each is outlived: its leases are released when it has ended, and not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")

_WAIT_S = 10.0


async def prepared_in_thread(
    prepare: Callable[[], Prepared], release: Callable[[Prepared], None]
) -> Prepared:
    """Return what `prepare` makes, in a thread; a caller that is cancelled meanwhile has it released."""
    preparing = asyncio.get_running_loop().run_in_executor(None, prepare)

    def release_unused(made: asyncio.Future[Prepared]) -> None:
        if not made.cancelled() and made.exception() is None:
            release(made.result())

    try:
        return await asyncio.shield(preparing)
    except asyncio.CancelledError:
        # The thread cannot be stopped; what it makes has no taker any more.
        preparing.add_done_callback(release_unused)
        raise
    finally:
        # An error's traceback leads to this frame, and the future to the error: a circle would keep the
        # views that the frames above hold, and with them the cache's entries.
        del preparing


class EndingRequests:
    """Aborted requests that their engine has not finished with. For use from one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def end(self, ending: Coroutine[Any, Any, None]) -> None:
        """Run `ending`, which releases a request's leases at its end: return by then, or after ten seconds.

        It then goes on in the background, with a warning in the log.
        """
        task = asyncio.create_task(ending, name="aborted request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        _, running = await asyncio.wait({task}, timeout=_WAIT_S)
        if running:
            logger.warning(
                "an aborted request has not ended within %g s; its embeddings stay leased until it does",
                _WAIT_S,
            )

    async def close(self) -> None:
        """Cancel what still runs: the engine has ended."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
