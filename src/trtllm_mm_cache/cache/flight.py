"""Single flight: of all who want the same thing at the same time, one loads it and all get it.

A flight is a task of its own, so no waiter's cancellation touches the load while another waits. The
values are leases, so every share that is made must reach exactly one owner: a waiter that is cancelled in
the very turn of the loop in which the result arrives discards the share that was made for it.

    waiting ──load done──▶ every waiter gets share(value), then the flight discards value
       │
       ├──load failed──▶ every waiter gets the error, then it is forgotten
       └──last waiter leaves──▶ the load is cancelled; a newcomer starts a new flight
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class FlightStatistics:
    """A snapshot. `in_flight` and `waiters` are now; the others count since the start.

    `joined` counts callers that found a flight under way; `failed` and `cancelled` count flights.
    """

    in_flight: int
    waiters: int
    started: int
    joined: int
    failed: int
    cancelled: int


class _Flight(Generic[V]):
    __slots__ = ("leaving", "share", "task", "waiters")

    def __init__(self, share: Callable[[V], V]) -> None:
        self.waiters: set[asyncio.Future[V]] = set()
        self.share = share
        self.task: asyncio.Task[None]
        self.leaving = False


class SingleFlight(Generic[V]):
    """One load at a time for each key. Belongs to one event loop; not thread-safe."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[V]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._counts = FlightStatistics(0, 0, 0, 0, 0, 0)
        self._closed = False

    async def run(
        self,
        key: str,
        load: Callable[[], Awaitable[V]],
        *,
        share: Callable[[V], V],
        discard: Callable[[V], None],
    ) -> tuple[V, bool]:
        """Return a share of what `load` makes for `key`, and whether a flight was under way already.

        The caller owns the share. `share` and `discard` must not block; `share` is called once for each
        waiter, `discard` once for the loaded value and once for each share whose waiter has gone.

        A failure of `load` is raised to everyone who waits now and is not remembered. When the caller is
        cancelled, the load goes on for the others; when it was the last, the load is cancelled, and
        `run` returns at once: the load ends on its own, `close` waits for it.
        """
        if self._closed:
            raise asyncio.CancelledError("the flights are closed")
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, load, share, discard)
        self._count(**{"joined" if joined else "started": 1})
        waiter: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        flight.waiters.add(waiter)
        try:
            return await waiter, joined
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                discard(waiter.result())
            raise
        finally:
            flight.waiters.discard(waiter)
            if not flight.waiters:
                self._leave(key, flight)

    def statistics(self) -> FlightStatistics:
        """Return a snapshot."""
        waiters = sum(len(flight.waiters) for flight in self._flights.values())
        return replace(self._counts, in_flight=len(self._flights), waiters=waiters)

    async def close(self) -> None:
        """Cancel every load, wait until each has ended, and refuse newcomers. Idempotent."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(
        self,
        key: str,
        load: Callable[[], Awaitable[V]],
        share: Callable[[V], V],
        discard: Callable[[V], None],
    ) -> _Flight[V]:
        flight = _Flight(share)
        flight.task = asyncio.create_task(self._fly(key, flight, load, discard), name=f"flight {key[:16]}")
        self._flights[key] = flight
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        return flight

    async def _fly(
        self, key: str, flight: _Flight[V], load: Callable[[], Awaitable[V]], discard: Callable[[V], None]
    ) -> None:
        try:
            value = await load()
        except asyncio.CancelledError:
            self._forget(key, flight)
            self._count(cancelled=1)
            for waiter in flight.waiters:
                waiter.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - it is raised to every waiter
            self._forget(key, flight)
            self._count(failed=1)
            for waiter in flight.waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            return
        self._forget(key, flight)
        try:
            for waiter in flight.waiters:
                if not waiter.done():
                    waiter.set_result(flight.share(value))
        finally:
            discard(value)

    def _leave(self, key: str, flight: _Flight[V]) -> None:
        if not flight.task.done() and self._flights.get(key) is flight:
            self._forget(key, flight)
            flight.task.cancel()

    def _forget(self, key: str, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _count(self, **more: int) -> None:
        self._counts = replace(
            self._counts, **{name: getattr(self._counts, name) + count for name, count in more.items()}
        )
