"""Single flight under cancellation: a table of cases, then every turn of the loop around the result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cache.flight_stage import Share, Stage, turns
from trtllm_mm_cache.errors import EncodeFailedError, LoadAbortedError


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
    Case("no one leaves", _land, ("led 1", "joined 1", "joined 1"), ("returned",)),
    Case("the leader leaves", _all(_cancel(0), _land), ("cancelled", "joined 1", "joined 1"), ("returned",)),
    Case("a follower leaves", _all(_cancel(1), _land), ("led 1", "cancelled", "joined 1"), ("returned",)),
    Case(
        "all but one leave", _all(_cancel(0, 1), _land), ("cancelled", "cancelled", "joined 1"), ("returned",)
    ),
    Case("everyone leaves", _cancel(0, 1, 2), ("cancelled",) * 3, ("cancelled",)),
    Case(
        "everyone leaves, another comes",
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
            await stage.flights.run("key", stage.load)
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
        return Share(stage.owners, 0)

    caller = asyncio.create_task(stage.flights.run("key", stubborn))
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
    assert stage.flights.cancelled == 1


async def test_a_cancelled_load_that_fails_is_logged(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async def messy() -> Share:
        try:
            await asyncio.Event().wait()
        finally:
            raise EncodeFailedError("while cleaning up")

    caller = asyncio.create_task(stage.flights.run("key", messy))
    await turns()
    caller.cancel()
    await turns()
    assert "while cleaning up" in caplog.text
    assert stage.flights.failed == 0


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
        await stage.flights.run("key", stage.load)
    assert stage.flights.cancelled == 2


async def test_close_does_not_wait_for_ever(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn() -> Share:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return Share(stage.owners, 0)

    caller = asyncio.create_task(stage.flights.run("key", stubborn))
    await turns()
    with caplog.at_level(logging.ERROR):
        await stage.flights.close(timeout_s=0.01)
    assert "1 loads did not end" in caplog.text
    with pytest.raises(LoadAbortedError):
        await caller
    release.set()
