"""A request at its end, where its reader may leave before the engine is done with it.

What an engine still reads holds leases, and cannot be stopped at once. So it is outlived: its leases are
released when it has ended, and not before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_WAIT_S = 10.0


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
