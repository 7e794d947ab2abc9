"""Cancellation at every step of a miss: whatever was begun is given back, here and on the encode worker.

The flow runs on the real parts: cache, flights, NIXL between two agents, an exporter. One run counts the
turns of the event loop that a miss takes; then it is run again and again and cancelled in each of them.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.pd.bench import Bench, assert_holds, image_url

MOST_TURNS = 400


async def turns(task: asyncio.Task[object], most: int) -> int:
    """Let the loop turn until `task` is done, at most `most` times; return how often it turned."""
    for turn in range(most):
        if task.done():
            return turn
        await asyncio.sleep(0)
    return most


async def settled(bench: Bench) -> None:
    """Wait until nothing is held on either side, and look at the accounting."""
    await bench.nothing_held()
    async with asyncio.timeout(10):
        while bench.peer.exporter.held or bench.reader.in_flight:
            await asyncio.sleep(0.001)
    flights = bench.tiers.flights
    assert (flights.in_flight, flights.waiters) == (0, 0)
    assert bench.resolver.waiting.items == 0
    for manager in (bench.cache, bench.transit, bench.peer.manager):
        manager.check_integrity()
        statistics = manager.statistics()
        assert statistics.forgotten == 0
        assert statistics.arena.used_bytes == statistics.current_bytes
    assert bench.peer.exporter.timed_out == 0, "an export was left to its timeout"


@pytest.mark.parametrize("images", [1, 3])
async def test_a_miss_cancelled_in_any_turn_of_the_loop_leaves_nothing(bench: Bench, images: int) -> None:
    outcomes = {"cancelled": 0, "finished": 0}
    turn = 0
    while outcomes["finished"] < 3:
        bench.cache.clear()
        references = [image_url() for _ in range(images)]
        request = asyncio.create_task(bench.resolve(references))
        await turns(request, turn)
        request.cancel()
        await asyncio.wait({request})
        if request.cancelled():
            outcomes["cancelled"] += 1
        else:
            outcomes["finished"] += 1
            for lease in request.result().leases:
                assert_holds(lease)
            request.result().release()
        await settled(bench)
        turn += 1
        assert turn < MOST_TURNS, "the request never finished"
    assert outcomes["cancelled"] >= 8, "the flow should take more turns than this"


async def test_one_of_two_waiters_cancelled_in_any_turn_leaves_the_other_its_embedding(
    bench: Bench,
) -> None:
    finished = turn = 0
    while finished < 3:
        bench.cache.clear()
        reference = image_url()
        leaving, staying = (asyncio.create_task(bench.resolve([reference])) for _ in range(2))
        await turns(leaving, turn)
        leaving.cancel()
        await asyncio.wait({leaving})
        if not leaving.cancelled():
            finished += 1
            leaving.result().release()
        images = await staying
        assert_holds(images.leases[0])
        images.release()
        await settled(bench)
        turn += 1
        assert turn < MOST_TURNS, "the request never finished"
