"""Room for preprocessed images: far larger than their files, they wait in small number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.observability.metrics import gauge


class PreparedRoom(Collector):
    """Lets `threads` images be prepared at a time, while less than `max_bytes` are prepared already.

    How large an image becomes is known when it is made, so each thread may go beyond the bound by one.
    For use from one event loop. `nbytes` are prepared now.
    """

    def __init__(self, threads: int, max_bytes: int) -> None:
        self._turns = asyncio.Semaphore(threads)
        self._max_bytes = max_bytes
        self._below = asyncio.Event()
        self._below.set()
        self.nbytes = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and take it while the block lasts."""
        async with self._turns:
            await self._below.wait()
            yield

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """Count `nbytes` as prepared while the block lasts."""
        self._count(nbytes)
        try:
            yield
        finally:
            self._count(-nbytes)

    def collect(self) -> Iterable[Metric]:
        """Yield what is prepared."""
        yield gauge("prepared_bytes", "Bytes of preprocessed images, in or before the tower.", self.nbytes)

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if self.nbytes < self._max_bytes:
            self._below.set()
        else:
            self._below.clear()
