"""Single flight: of all who want the same thing at the same time, one loads it and all get it.

A flight is a task of its own, so no waiter's cancellation touches the load while another waits. The
values are leases, so each share that is made must reach exactly one owner: a waiter that is cancelled in
the very turn of the loop in which the result arrives discards the share that was made for it::

    in flight ──load returns──▶ every waiter gets share(value), then the flight discards value
        ├───────load raises──▶ every waiter gets the error, then it is forgotten
        └───────last waiter leaves──▶ the load is cancelled; a newcomer starts a new flight

What happened is decided in the task's done-callback, not inside the task: a task that is cancelled
before its first step never runs, and its waiters would wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from trtllm_mm_cache.errors import LoadAbortedError

logger = logging.getLogger(__name__)

V = TypeVar("V")


class _Flight(Generic[V]):
    """One load under way: its task, and who waits for it."""

    __slots__ = ("task", "waiters")

    task: asyncio.Task[V]

    def __init__(self) -> None:
        self.waiters: set[asyncio.Future[V]] = set()


class SingleFlight(Generic[V]):
    """One load at a time for each key. For use from one event loop; the counts may be read from any thread.

    `share` makes one more of a loaded value, `discard` ends one; neither may block. `share` is called once
    for each waiter, `discard` once for the loaded value and once for each share whose waiter has gone.

    `started` counts flights, `joined` callers that found one under way, `failed` flights whose load raised,
    `cancelled` those that were cancelled because no waiter was left, or by `close`.
    """

    def __init__(self, *, share: Callable[[V], V], discard: Callable[[V], None]) -> None:
        self._share = share
        self._discard = discard
        self._flights: dict[str, _Flight[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()
        self.started = self.joined = self.failed = self.cancelled = 0
        self.waiters = 0
        self._closed = False

    def __contains__(self, key: str) -> bool:
        """Whether a caller of `run` would join a flight that is under way."""
        return key in self._flights

    @property
    def in_flight(self) -> int:
        """Flights under way."""
        return len(self._flights)

    async def run(self, key: str, load: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """Return a share of what `load` makes for `key`, and whether its flight was under way already.

        The caller owns the share. A caller that joins has its own `load` dropped, not called.

        A failure of `load` is raised to everyone who waits now and is not remembered; all get the same
        exception object, each raise with the traceback of the load and of its own waiter only.
        When the caller is cancelled, the load goes on for the others; when it was the last, the load is
        cancelled and `run` raises at once, without waiting for the load to end (`close` does that). So
        the load for a newcomer may begin while the cancelled one still cleans up.

        Raises `LoadAbortedError` when the flights are or get closed, or when the load ends as cancelled
        although callers wait.
        """
        if self._closed:
            raise LoadAbortedError("this worker is shutting down; retry on another")
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, load)
        else:
            self.joined += 1
        waiter: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        flight.waiters.add(waiter)
        self.waiters += 1
        try:
            return await waiter, joined
        except asyncio.CancelledError:
            # The outcome may have arrived in this very turn; no one else will look at it.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._discard(waiter.result())
            raise
        finally:
            self.waiters -= 1
            flight.waiters.discard(waiter)
            self._cancel_if_deserted(key, flight)
            # An exception that passes here keeps this frame; without these two it would keep itself,
            # and with it every lease in the frames above, until the garbage collector runs.
            del flight, waiter

    async def close(self, *, timeout_s: float = 10.0) -> None:
        """Cancel every load, wait for their end, at most `timeout_s` seconds, and refuse newcomers.

        Who still waits gets `LoadAbortedError` at once. Idempotent. Loads that ignore their cancellation are
        logged and left behind; their values are discarded when they come.
        """
        self._closed = True
        for key, flight in list(self._flights.items()):
            self._cancel(key, flight)
            _fail(flight, LoadAbortedError("this worker is shutting down; retry on another"))
        if not self._tasks:
            return
        _, running = await asyncio.wait(list(self._tasks), timeout=timeout_s)
        if running:
            logger.error(
                "%d loads did not end within %g seconds of their cancellation", len(running), timeout_s
            )

    def _start(self, key: str, load: Callable[[], Awaitable[V]]) -> _Flight[V]:
        flight: _Flight[V] = _Flight()

        async def fly() -> V:
            return await load()

        self.started += 1
        flight.task = asyncio.create_task(fly(), name=f"flight {key[:16]}")
        flight.task.add_done_callback(partial(self._land, key, flight))
        self._tasks.add(flight.task)
        self._flights[key] = flight
        return flight

    def _land(self, key: str, flight: _Flight[V], task: asyncio.Task[V]) -> None:
        """Give the outcome to everyone who waits."""
        self._tasks.discard(task)
        cancelled_by_us = self._flights.get(key) is not flight
        if not cancelled_by_us:
            del self._flights[key]
        error = LoadAbortedError("the load was cancelled; retry") if task.cancelled() else task.exception()
        if error is None:
            self._distribute(flight, task.result())
            return
        if not cancelled_by_us:
            self.failed += 1
        elif not task.cancelled():
            logger.warning("a cancelled load failed while it cleaned up", exc_info=error)
        _fail(flight, error)

    def _cancel_if_deserted(self, key: str, flight: _Flight[V]) -> None:
        if not flight.waiters and not flight.task.done():
            self._cancel(key, flight)

    def _cancel(self, key: str, flight: _Flight[V]) -> None:
        """Cancel the load; whoever comes now starts another flight."""
        if self._flights.get(key) is flight:
            del self._flights[key]
            self.cancelled += 1
            flight.task.cancel()

    def _distribute(self, flight: _Flight[V], value: V) -> None:
        try:
            for waiter in flight.waiters:
                if waiter.done():  # cancelled, and about to leave
                    continue
                try:
                    waiter.set_result(self._share(value))
                except Exception as error:  # noqa: BLE001 - it is raised to the waiter, who would hang otherwise
                    waiter.set_exception(error)
        finally:
            self._discard(value)


def _fail(flight: _Flight[V], error: BaseException) -> None:
    for waiter in flight.waiters:
        if not waiter.done():
            waiter.set_exception(error)
