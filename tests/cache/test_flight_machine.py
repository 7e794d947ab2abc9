"""Random life of single flight, one turn of the event loop at a time, against a model of its invariant.

One load a key at a time; a waiter that is cancelled disturbs no other; the last one leaving cancels the load;
an outcome reaches exactly those who waited for it; every share has one owner in the end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache.flight_stage import Owners, Share, turns
from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.errors import EncodeFailedError, LoadAbortedError

KEYS = st.sampled_from("abc")
WHICH = st.sets(st.integers(0, 5), max_size=6)


@dataclass(eq=False)
class Load:
    """One load under way: its gate, what it ends with, and whether it was cancelled."""

    key: str
    serial: int
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None
    ended: bool = False
    cancelled: bool = False


@dataclass(eq=False)
class Caller:
    """One caller, and whether it was cancelled while it waited."""

    key: str
    task: asyncio.Task[tuple[Share, bool]]
    cancelled: bool = False


class FlightMachine(RuleBasedStateMachine):
    """Every rule ends after some turns of the loop, so cancellations meet outcomes in all orders."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.complaints: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(str(context)))
        self.flights: SingleFlight[Share] = SingleFlight(share=Share.share, discard=Share.discard)
        self.owners = Owners()
        self.loads: list[Load] = []
        self.waiting: list[Caller] = []
        self.outcomes: Counter[str] = Counter()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def load(self, key: str) -> Share:
        load = Load(key, len(self.loads))
        assert not self.flying(key), "two loads of one key at a time"
        self.loads.append(load)
        try:
            await load.gate.wait()
            if load.failure is not None:
                raise load.failure
        except asyncio.CancelledError:
            load.cancelled = True
            raise
        finally:
            load.ended = True
        return Share(self.owners, load.serial)

    def flying(self, key: str) -> Load | None:
        """The load of `key` that a caller waits for; a cancelled one still cleaning up is none."""
        return next((load for load in self.loads if load.key == key and not load.ended), None)

    async def call(self, key: str) -> tuple[Share, bool]:
        return await self.flights.run(key, lambda: self.load(key))

    @rule(key=KEYS, count=st.integers(1, 4), after=st.integers(0, 4))
    def come(self, key: str, count: int, after: int) -> None:
        async def arrive() -> list[Caller]:
            arrived = [Caller(key, self.loop.create_task(self.call(key))) for _ in range(count)]
            await turns(after)
            return arrived

        self.waiting += self.run(arrive())

    def cancel(self, key: str, which: set[int]) -> None:
        callers = [caller for caller in self.waiting if caller.key == key]
        for caller in [callers[index] for index in which if index < len(callers)]:
            caller.cancelled |= caller.task.cancel()

    @rule(key=KEYS, which=WHICH, after=st.integers(0, 4))
    def leave(self, key: str, which: set[int], after: int) -> None:
        async def go() -> None:
            self.cancel(key, which)
            await turns(after)

        self.run(go())

    # Two turns after its gate opens the outcome is with the waiters, who have not run yet.
    @precondition(lambda self: not all(load.ended for load in self.loads))
    @rule(
        nth=st.integers(0, 2),
        fails=st.booleans(),
        then_leave=WHICH,
        after=st.sampled_from([2, 0, 1, 3, 4]),
    )
    def land(self, nth: int, fails: bool, then_leave: set[int], after: int) -> None:
        """A load ends, and some leave a number of turns after that."""
        flying = [load for load in self.loads if not load.ended]
        load = flying[nth % len(flying)]

        async def end() -> None:
            load.failure = EncodeFailedError("the tower failed") if fails else None
            load.gate.set()
            await turns(after)
            self.cancel(load.key, then_leave)
            await turns()

        self.run(end())

    @rule()
    def settle(self) -> None:
        """Let everything that is ready happen; then the model must hold exactly."""
        self.run(turns(8))
        for caller in [caller for caller in self.waiting if caller.task.done()]:
            self.waiting.remove(caller)
            self.take(caller)
        for load in self.loads:
            wanted = any(caller.key == load.key for caller in self.waiting)
            assert load.ended or wanted, "a load flies although no caller waits"
        assert {caller.key for caller in self.waiting} == {load.key for load in self.loads if not load.ended}
        snapshot = self.flights
        assert snapshot.in_flight == len({caller.key for caller in self.waiting})
        assert snapshot.waiters == len(self.waiting)
        assert self.owners.alive == 0, "a share has no owner"

    def take(self, caller: Caller) -> None:
        """Look at what a caller got, and discard its share."""
        if caller.task.cancelled():
            assert caller.cancelled, "a caller was cancelled by another's cancellation"
            self.outcomes["cancelled"] += 1
            return
        error = caller.task.exception()
        if error is not None:
            assert isinstance(error, EncodeFailedError), error
            self.outcomes["failed"] += 1
            return
        share, joined = caller.task.result()
        load = self.loads[share.serial]
        assert load.key == caller.key
        assert load.failure is None
        assert not load.cancelled
        share.discard()
        self.outcomes["joined" if joined else "led"] += 1

    @invariant()
    def counters_agree(self) -> None:
        snapshot = self.flights
        assert snapshot.started >= len(self.loads)
        failed = [load for load in self.loads if load.ended and load.failure and not load.cancelled]
        assert snapshot.failed == len(failed)
        assert snapshot.in_flight <= 3
        assert not self.complaints

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.loop.close()

    def end(self) -> None:
        self.run(turns(8))
        waiting = [caller for caller in self.waiting if not caller.task.done()]
        self.run(self.flights.close(timeout_s=5))
        self.run(turns())
        for caller in self.waiting:
            error = None if caller.task.cancelled() else caller.task.exception()
            if caller in waiting and not caller.cancelled:
                assert isinstance(error, LoadAbortedError)
            elif not caller.task.cancelled() and error is None:
                caller.task.result()[0].discard()
        assert all(load.ended for load in self.loads)
        assert self.owners.alive == 0, "a share has no owner"
        assert (self.flights.in_flight, self.flights.waiters) == (0, 0)
        assert not self.complaints


TestFlightMachine = FlightMachine.TestCase
TestFlightMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
