"""Single flight: who loads, who gets what, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from tests.cache.flight_stage import Share, Stage, turns
from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.errors import EncodeFailedError


async def test_one_load_and_everyone_gets_a_share(stage: Stage) -> None:
    for _ in range(16):
        stage.call()
    await turns()
    flights = stage.flights
    assert (flights.in_flight, flights.waiters, flights.started, flights.joined) == (1, 16, 1, 15)
    assert "key" in flights
    stage.gate.set()
    assert await stage.outcomes() == ["led 1"] + ["joined 1"] * 15
    assert (stage.loads, stage.owners.made) == (1, 17)


async def test_keys_fly_apart_and_nothing_is_remembered(stage: Stage) -> None:
    stage.gate.set()
    stage.call("one")
    stage.call("two")
    assert await stage.outcomes() == ["led 1", "led 2"]
    stage.callers.clear()
    stage.call("one")
    assert await stage.outcomes() == ["led 3"]
    assert stage.flights.joined == 0


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
    assert stage.flights.failed == 1
    stage.failure = None
    stage.callers.clear()
    stage.call()
    assert await stage.outcomes() == ["led 2"]


async def test_a_failure_with_many_waiters_has_a_short_traceback_each(stage: Stage) -> None:
    stage.failure = EncodeFailedError("the tower failed")
    depths = []

    async def caller() -> None:
        try:
            await stage.flights.run("key", stage.load)
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
            await stage.flights.run("key", failing)
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
        if stage.owners.made == 2:
            stage.owners.made += 1
            raise EncodeFailedError("no share")
        return share.share()

    stage.flights = SingleFlight(share=refuse_the_second, discard=Share.discard)
    for _ in range(3):
        stage.call()
    await turns()
    stage.gate.set()
    outcomes = await stage.outcomes()
    assert outcomes.count("EncodeFailedError") == 1
    assert len(outcomes) == 3
