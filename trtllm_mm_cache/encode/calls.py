"""The calls that an encode worker is answering, by their ids: a PD worker may take one back.

It says so in a call of its own. Dynamo's way, stopping the call's context, closes the answer's stream at the
asker's end, and an answer that is on its way then is lost: its export would stay leased until the timeout.
This way each call is answered once, whatever happens, or ends because it was taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_EARLY = 1024


class RunningCalls:
    """Calls under way. For use from one event loop.

    A small message may overtake a large one: of calls that were taken back before they came, the last 1024
    ids are remembered.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[None]] = {}
        self._early: dict[str, None] = {}

    @contextmanager
    def running(self, call_id: str) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done when the call is taken back, while it is answered in the block."""
        taken_back = asyncio.get_running_loop().create_future()
        if call_id in self._early:
            del self._early[call_id]
            taken_back.set_result(None)
        self._running[call_id] = taken_back
        try:
            yield taken_back
        finally:
            if self._running.get(call_id) is taken_back:  # ids are the askers': two may use the same
                del self._running[call_id]

    def take_back(self, call_id: str) -> None:
        """Take a call back, whether it is here already or not."""
        taken_back = self._running.get(call_id)
        if taken_back is None:
            while len(self._early) >= _MOST_EARLY:
                del self._early[next(iter(self._early))]
            self._early[call_id] = None
        elif not taken_back.done():
            taken_back.set_result(None)
