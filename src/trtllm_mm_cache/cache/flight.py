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
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from trtllm_mm_cache.errors import LoadAbortedError

logger = logging.getLogger(__name__)

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class FlightStatistics:
    """A snapshot. `in_flight` and `waiters` are now; the others count since the start.

    `joined` counts callers that found a flight under way. Of the flights, `failed` counts those whose
    load raised, `cancelled` those that were cancelled because nobody waited any more or by `close`.
    """

    in_flight: int
    waiters: int
    started: int
    joined: int
    failed: int
    cancelled: int


class _Flight(Generic[V]):
    """One load under way: its task, who waits for it, and how to share and discard its value."""

    __slots__ = ("discard", "share", "task", "waiters")

    task: asyncio.Task[V]

    def __init__(self, share: Callable[[V], V], discard: Callable[[V], None]) -> None:
        self.share = share
        self.discard = discard
        self.waiters: set[asyncio.Future[V]] = set()


class SingleFlight(Generic[V]):
    """One load at a time for each key. For use from one event loop; `statistics` from any thread."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()
        self._waiters = self._started = self._joined = self._failed = self._cancelled = 0
        self._closed = False

    async def run(
        self,
        key: str,
        load: Callable[[], Awaitable[V]],
        *,
        share: Callable[[V], V],
        discard: Callable[[V], None],
    ) -> tuple[V, bool]:
        """Return a share of what `load` makes for `key`, and whether its flight was under way already.

        The caller owns the share. `share` and `discard` must not block; `share` is called once for each
        waiter, `discard` once for the loaded value and once for each share whose waiter has gone.

        A failure of `load` is raised to everyone who waits now and is not remembered; all get the same
        exception object, each raise with the traceback of the load and of its own waiter only.
        When the caller is cancelled, the load goes on for the others; when it was the last, the load is
        cancelled and `run` raises at once, without waiting for the load to end (`close` does that). So
        the load for a newcomer may begin while the cancelled one still cleans up.

        Raises `LoadAbortedError` when the flights are or get closed, or when the load ends as cancelled
        although somebody waits.
        """
        if self._closed:
            raise LoadAbortedError("this worker is shutting down; retry on another")
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, load, _Flight(share, discard))
        else:
            self._joined += 1
        waiter: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        flight.waiters.add(waiter)
        self._waiters += 1
        try:
            return await waiter, joined
        except asyncio.CancelledError:
            # The outcome may have arrived in this very turn; nobody else will look at it.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                discard(waiter.result())
            raise
        finally:
            self._waiters -= 1
            flight.waiters.discard(waiter)
            self._cancel_if_deserted(key, flight)
            # An exception that passes here keeps this frame; without these two it would keep itself,
            # and with it every lease in the frames above, until the garbage collector runs.
            del flight, waiter

    def statistics(self) -> FlightStatistics:
        """Return a snapshot."""
        return FlightStatistics(
            in_flight=len(self._flights),
            waiters=self._waiters,
            started=self._started,
            joined=self._joined,
            failed=self._failed,
            cancelled=self._cancelled,
        )

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

    def _start(self, key: str, load: Callable[[], Awaitable[V]], flight: _Flight[V]) -> _Flight[V]:
        async def fly() -> V:
            return await load()

        self._started += 1
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
            _distribute(flight, task.result())
            return
        if not cancelled_by_us:
            self._failed += 1
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
            self._cancelled += 1
            flight.task.cancel()


def _fail(flight: _Flight[V], error: BaseException) -> None:
    for waiter in flight.waiters:
        if not waiter.done():
            waiter.set_exception(error)


def _distribute(flight: _Flight[V], value: V) -> None:
    try:
        for waiter in flight.waiters:
            if waiter.done():  # cancelled, and about to leave
                continue
            try:
                waiter.set_result(flight.share(value))
            except Exception as error:  # noqa: BLE001 - it is raised to the waiter, who would hang otherwise
                waiter.set_exception(error)
    finally:
        flight.discard(value)
