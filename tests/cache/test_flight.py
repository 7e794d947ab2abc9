"""Single flight: who loads, who gets what, and what is left behind in every case of cancellation."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.errors import EncodeFailedError, LoadAbortedError


class Share:
    """Counts its owners, as a lease does."""

    def __init__(self, ledger: Ledger, serial: int) -> None:
        self.ledger = ledger
        self.serial = serial
        self.discarded = False
        ledger.alive += 1
        ledger.made += 1

    def share(self) -> Share:
        assert not self.discarded
        return Share(self.ledger, self.serial)

    def discard(self) -> None:
        assert not self.discarded, "discarded twice"
        self.discarded = True
        self.ledger.alive -= 1


@dataclass
class Ledger:
    alive: int = 0
    made: int = 0


@dataclass
class Stage:
    """A flight whose load waits at a gate, and the callers that wait for it."""

    flights: SingleFlight[Share] = field(default_factory=SingleFlight)
    ledger: Ledger = field(default_factory=Ledger)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None
    loads: int = 0
    ended: list[str] = field(default_factory=list)
    callers: list[asyncio.Task[tuple[Share, bool]]] = field(default_factory=list)

    async def load(self) -> Share:
        self.loads += 1
        serial = self.loads
        try:
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("returned")
        return Share(self.ledger, serial)

    def call(self, key: str = "key") -> asyncio.Task[tuple[Share, bool]]:
        caller = asyncio.create_task(
            self.flights.run(key, self.load, share=Share.share, discard=Share.discard)
        )
        self.callers.append(caller)
        return caller

    async def outcomes(self) -> list[str]:
        """Wait for every caller, at most 5 seconds; name what each got; give its share back."""
        await asyncio.wait(self.callers, timeout=5)
        names = []
        for caller in self.callers:
            assert caller.done(), "a caller hangs"
            if caller.cancelled():
                names.append("cancelled")
            elif (error := caller.exception()) is not None:
                names.append(type(error).__name__)
            else:
                share, joined = caller.result()
                share.discard()
                names.append(("joined" if joined else "led") + f" {share.serial}")
        return names


async def turns(count: int = 5) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """After every test: no share without an owner, no flight, no complaint to the event loop."""
    complaints: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
    stage = Stage()
    yield stage
    await stage.flights.close(timeout_s=5)
    await turns()
    stage.callers.clear()
    gc.collect()  # futures complain when they are collected
    statistics = stage.flights.statistics()
    assert (statistics.in_flight, statistics.waiters) == (0, 0)
    assert stage.ledger.alive == 0, "a share has no owner"
    assert complaints == []


async def test_one_load_and_everyone_gets_a_share(stage: Stage) -> None:
    for _ in range(16):
        stage.call()
    await turns()
    statistics = stage.flights.statistics()
    assert (statistics.in_flight, statistics.waiters, statistics.started, statistics.joined) == (1, 16, 1, 15)
    stage.gate.set()
    assert await stage.outcomes() == ["led 1"] + ["joined 1"] * 15
    assert (stage.loads, stage.ledger.made) == (1, 17)


async def test_keys_fly_apart_and_nothing_is_remembered(stage: Stage) -> None:
    stage.gate.set()
    stage.call("one")
    stage.call("two")
    assert await stage.outcomes() == ["led 1", "led 2"]
    stage.callers.clear()
    stage.call("one")
    assert await stage.outcomes() == ["led 3"]
    assert stage.flights.statistics().joined == 0


@pytest.mark.parametrize("turn", range(6))
async def test_who_comes_in_any_turn_around_the_result_joins_or_flies(stage: Stage, turn: int) -> None:
    stage.call()
    await turns()
    stage.gate.set()
    await turns(turn)
    stage.call()
    assert await stage.outcomes() in (["led 1", "joined 1"], ["led 1", "led 2"])


async def test_a_failure_reaches_everyone_who_waits_once_and_is_forgotten(stage: Stage) -> None:
    stage.failure = EncodeFailedError("the tower failed")
    for _ in range(3):
        stage.call()
    await turns()
    stage.gate.set()
    assert await stage.outcomes() == ["EncodeFailedError"] * 3
    assert stage.flights.statistics().failed == 1
    stage.failure = None
    stage.callers.clear()
    stage.call()
    assert await stage.outcomes() == ["led 2"]


async def test_a_failure_with_many_waiters_has_a_short_traceback_each(stage: Stage) -> None:
    stage.failure = EncodeFailedError("the tower failed")
    depths = []

    async def caller() -> None:
        try:
            await stage.flights.run("key", stage.load, share=Share.share, discard=Share.discard)
        except EncodeFailedError as error:
            trace, depth = error.__traceback__, 0
            while trace is not None:
                trace, depth = trace.tb_next, depth + 1
            depths.append(depth)

    tasks = [asyncio.create_task(caller()) for _ in range(50)]
    await turns()
    stage.gate.set()
    await asyncio.wait(tasks, timeout=5)
    assert len(depths) == 50
    assert max(depths) == min(depths)


async def test_a_handled_failure_keeps_nothing_alive(stage: Stage) -> None:
    """Without the garbage collector: an exception in a cycle would keep its caller's leases."""

    class Canary:
        pass

    async def caller() -> weakref.ref[Canary]:
        canary = Canary()
        reference = weakref.ref(canary)
        with pytest.raises(EncodeFailedError):
            await stage.flights.run("key", failing, share=Share.share, discard=Share.discard)
        return reference

    async def failing() -> Share:
        raise EncodeFailedError("at once")

    gc.collect()
    gc.disable()
    try:
        reference = await asyncio.create_task(caller())
        assert reference() is None
    finally:
        gc.enable()


async def test_a_share_that_cannot_be_made_is_an_error_for_its_waiter_alone(stage: Stage) -> None:
    def refuse_the_second(share: Share) -> Share:
        if stage.ledger.made == 2:
            stage.ledger.made += 1
            raise EncodeFailedError("no share")
        return share.share()

    for _ in range(3):
        stage.callers.append(
            asyncio.create_task(
                stage.flights.run("key", stage.load, share=refuse_the_second, discard=Share.discard)
            )
        )
    await turns()
    stage.gate.set()
    outcomes = await stage.outcomes()
    assert sorted(outcomes)[:1] == ["EncodeFailedError"]
    assert outcomes.count("EncodeFailedError") == 1


# Each case: what happens to three callers (A leads) while or after the load waits at its gate;
# what A, B, C and a newcomer D end with; how the loads end.
@dataclass(frozen=True)
class Case:
    name: str
    script: Callable[[Stage], None]
    outcomes: tuple[str, ...]
    loads: tuple[str, ...]
    newcomer: bool = False


def _cancel(*callers: int) -> Callable[[Stage], None]:
    def script(stage: Stage) -> None:
        for caller in callers:
            stage.callers[caller].cancel()

    return script


def _land_then(*steps: Callable[[Stage], None]) -> Callable[[Stage], None]:
    """The result arrives and the steps happen in the same turn of the loop."""

    def script(stage: Stage) -> None:
        stage.gate.set()
        flight = stage.flights._flights["key"]
        flight.task.add_done_callback(lambda _: [step(stage) for step in steps])

    return script


def _all(*steps: Callable[[Stage], None]) -> Callable[[Stage], None]:
    def script(stage: Stage) -> None:
        for step in steps:
            step(stage)

    return script


def _fail(stage: Stage) -> None:
    stage.failure = EncodeFailedError("the tower failed")


def _cancel_the_load(stage: Stage) -> None:
    stage.flights._flights["key"].task.cancel()


def _land(stage: Stage) -> None:
    stage.gate.set()


CASES = [
    Case("nobody leaves", _land, ("led 1", "joined 1", "joined 1"), ("returned",)),
    Case("the leader leaves", _all(_cancel(0), _land), ("cancelled", "joined 1", "joined 1"), ("returned",)),
    Case("a follower leaves", _all(_cancel(1), _land), ("led 1", "cancelled", "joined 1"), ("returned",)),
    Case(
        "all but one leave", _all(_cancel(0, 1), _land), ("cancelled", "cancelled", "joined 1"), ("returned",)
    ),
    Case("everyone leaves", _cancel(0, 1, 2), ("cancelled",) * 3, ("cancelled",)),
    Case(
        "everyone leaves, someone comes",
        _cancel(0, 1, 2),
        ("cancelled", "cancelled", "cancelled", "led 2"),
        ("cancelled", "returned"),
        newcomer=True,
    ),
    Case(
        "the leader leaves as the result arrives",
        _land_then(_cancel(0)),
        ("cancelled", "joined 1", "joined 1"),
        ("returned",),
    ),
    Case(
        "everyone leaves as the result arrives",
        _land_then(_cancel(0, 1, 2)),
        ("cancelled",) * 3,
        ("returned",),
    ),
    Case(
        "one leaves as the failure arrives",
        _all(_fail, _land_then(_cancel(1))),
        ("EncodeFailedError", "cancelled", "EncodeFailedError"),
        (),
    ),
    Case(
        "everyone leaves as the failure arrives",
        _all(_fail, _land_then(_cancel(0, 1, 2))),
        ("cancelled",) * 3,
        (),
    ),
    Case("the load is cancelled from outside", _cancel_the_load, ("LoadAbortedError",) * 3, ("cancelled",)),
    Case(
        "cancelled twice",
        _all(_cancel(0), _cancel(0), _land),
        ("cancelled", "joined 1", "joined 1"),
        ("returned",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_cancellation(stage: Stage, case: Case) -> None:
    for _ in range(3):
        stage.call()
    await turns()
    case.script(stage)
    if case.newcomer:
        await asyncio.sleep(0)
        stage.call()
        await turns()
        stage.gate.set()
    outcomes = await stage.outcomes()
    await turns()
    assert tuple(outcomes) == case.outcomes
    assert tuple(stage.ended) == case.loads


@pytest.mark.parametrize("turn", range(6))
async def test_a_waiter_cancelled_in_any_turn_around_the_result_leaks_nothing(
    stage: Stage, turn: int
) -> None:
    callers = [stage.call() for _ in range(3)]
    await turns()
    stage.gate.set()
    await turns(turn)
    for caller in callers[:2]:
        caller.cancel()
    outcomes = await stage.outcomes()
    assert outcomes[2] == "joined 1"
    assert set(outcomes[:2]) <= {"cancelled", "led 1", "joined 1"}


@pytest.mark.parametrize("turn", range(6))
async def test_the_only_waiter_cancelled_in_any_turn_leaks_nothing(stage: Stage, turn: int) -> None:
    caller = stage.call()
    stage.gate.set()
    await turns(turn)
    caller.cancel()
    assert (await stage.outcomes())[0] in {"cancelled", "led 1"}


async def test_a_timeout_around_one_waiter_does_not_touch_the_others(stage: Stage) -> None:
    stage.call()
    await turns()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await stage.flights.run("key", stage.load, share=Share.share, discard=Share.discard)
    stage.gate.set()
    assert await stage.outcomes() == ["led 1"]


async def test_a_load_that_ignores_its_cancellation_has_its_value_discarded(stage: Stage) -> None:
    release = asyncio.Event()

    async def stubborn() -> Share:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return Share(stage.ledger, 0)

    caller = asyncio.create_task(stage.flights.run("key", stubborn, share=Share.share, discard=Share.discard))
    await turns()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    stage.call()
    await turns()
    assert stage.loads == 1, "the newcomer flies although the stubborn load still runs"
    release.set()
    stage.gate.set()
    assert await stage.outcomes() == ["led 1"]
    assert stage.flights.statistics().cancelled == 1


async def test_a_cancelled_load_that_fails_is_logged(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async def messy() -> Share:
        try:
            await asyncio.Event().wait()
        finally:
            raise EncodeFailedError("while cleaning up")

    caller = asyncio.create_task(stage.flights.run("key", messy, share=Share.share, discard=Share.discard))
    await turns()
    caller.cancel()
    await turns()
    assert "while cleaning up" in caplog.text
    assert stage.flights.statistics().failed == 0


async def test_close_ends_loads_and_tells_the_waiters(stage: Stage) -> None:
    started = stage.call()
    await turns()
    fresh = stage.call("not even started")
    await asyncio.sleep(0)
    await stage.flights.close()
    assert await stage.outcomes() == ["LoadAbortedError", "LoadAbortedError"]
    assert started.done()
    assert fresh.done()
    with pytest.raises(LoadAbortedError, match="shutting down"):
        await stage.flights.run("key", stage.load, share=Share.share, discard=Share.discard)
    assert stage.flights.statistics().cancelled == 2


async def test_close_does_not_wait_for_ever(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn() -> Share:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return Share(stage.ledger, 0)

    caller = asyncio.create_task(stage.flights.run("key", stubborn, share=Share.share, discard=Share.discard))
    await turns()
    with caplog.at_level(logging.ERROR):
        await stage.flights.close(timeout_s=0.01)
    assert "1 loads did not end" in caplog.text
    with pytest.raises(LoadAbortedError):
        await caller
    release.set()
