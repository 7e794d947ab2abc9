"""A READ by NIXL goes in chunks: what happens between two of them; the whole is what is judged."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from tests.transfer.conftest import TCP, PdSide, PdSideMaker, RemoteMaker, by_nixl, until
from tests.transfer.embedding import embedding
from tests.transfer.remote import RemoteExporter, until_statistic
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    InvalidEmbeddingError,
    PeerLostError,
    TransferTimeoutError,
)
from trtllm_mm_cache.transfer import Export, Exporter, TransferAgent
from trtllm_mm_cache.transfer.reads import CHUNK_BYTES, IN_FLIGHT

pytestmark = by_nixl

NBYTES = 3 * CHUNK_BYTES + 1000


async def read(pd_side: PdSide, exporter: RemoteExporter, key: str, export: Export) -> None:
    reservation = pd_side.reserve(key, export.nbytes)
    await pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=20)
    with reservation.commit(dtype=torch.uint8, shape=(1, export.nbytes)) as lease:
        assert torch.equal(lease.tensor.flatten(), embedding(key, export.nbytes))


def act_between_chunks(
    pd_side: PdSide, reading: Coroutine[Any, Any, None], act: Callable[[], None]
) -> Coroutine[Any, Any, None]:
    """Have the agent run `act` when the READ that `reading` begins has its first chunks, and await it.

    The agent runs its commands in their order and takes each READ further after each: by a chunk where NIXL
    copies at once, by as many as are in flight where it does not.
    """

    async def run() -> None:
        gate = threading.Event()
        pd_side.agent.call(lambda nixl: gate.wait(10))
        task = asyncio.create_task(reading)
        await asyncio.sleep(0)  # the task's first step has queued the READ
        acted = asyncio.wrap_future(pd_side.agent.call(lambda nixl: act()))
        gate.set()
        try:
            await task
        finally:
            await acted

    return run()


def on_loop(do: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], None]:
    """Return what runs a coroutine of this loop and waits for it, from another thread."""
    loop = asyncio.get_running_loop()
    return lambda: asyncio.run_coroutine_threadsafe(do(), loop).result(20)


async def connected(pd_side: PdSide, exporter: RemoteExporter) -> Export:
    """Return an export of several chunks, from an exporter that has been read from."""
    await read(pd_side, exporter, "first", await exporter.export("first", 1000))
    await until_statistic(exporter, "acked", 1)
    return await exporter.export("a", NBYTES)


async def test_between_two_chunks_the_agent_serves_others_and_the_exporter_holds_on(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await connected(pd_side, exporter)
    seen: list[tuple[int, int, int]] = []

    async def look() -> None:
        held = (await exporter.do("statistics"))["held"]
        seen.append((pd_side.reader.in_flight, pd_side.reader.completed, held))

    await act_between_chunks(pd_side, read(pd_side, exporter, "a", export), on_loop(look))
    assert seen == [(1, 1, 1)]
    assert pd_side.reader.completed_bytes == 1000 + NBYTES
    await until_statistic(exporter, "acked", 2)


async def test_the_last_chunk_ends_where_the_embedding_ends(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await connected(pd_side, exporter)
    reservation = pd_side.reserve("a", NBYTES)
    neighbour = pd_side.reserve("b", CHUNK_BYTES)
    assert 0 <= neighbour.address - (reservation.address + NBYTES) < CHUNK_BYTES
    ctypes.memset(neighbour.address, 7, CHUNK_BYTES)
    await pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=20)
    assert ctypes.string_at(neighbour.address, CHUNK_BYTES) == bytes([7]) * CHUNK_BYTES
    reservation.abandon()
    neighbour.abandon()


async def test_an_extent_that_is_rewritten_between_two_chunks_is_no_embedding(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    """Each chunk is one that was exported some time; together they are neither of the two."""
    export = await connected(pd_side, exporter)

    async def time_out_and_rewrite() -> None:
        await exporter.do("advance_clock", seconds=31)
        await until_statistic(exporter, "timed_out", 1)
        await exporter.do("clear")
        await exporter.export("first", 1000)
        assert (await exporter.export("b", NBYTES)).address == export.address

    with pytest.raises(ChecksumMismatchError):
        await act_between_chunks(pd_side, read(pd_side, exporter, "a", export), on_loop(time_out_and_rewrite))
    assert pd_side.reader.corrupt == 1
    pd_side.assert_nothing_leaked()


@pytest.mark.parametrize("transports", [None, TCP])
async def test_an_exporter_that_dies_between_two_chunks_is_lost_and_leaves_nothing(
    transports: str | None,
    monkeypatch: pytest.MonkeyPatch,
    make_pd_side: PdSideMaker,
    make_exporter_process: RemoteMaker,
) -> None:
    if transports is not None:
        monkeypatch.setenv("UCX_TLS", transports)
    exporter = await make_exporter_process().start_agent(transports=transports)
    pd_side = await make_pd_side()
    export = await connected(pd_side, exporter)
    async with asyncio.timeout(10):
        with pytest.raises(PeerLostError):
            await act_between_chunks(pd_side, read(pd_side, exporter, "a", export), exporter.kill)
    assert (pd_side.reader.completed, pd_side.reader.failed, pd_side.reader.peers) == (1, 1, 0)
    pd_side.assert_nothing_leaked()


@pytest.mark.parametrize("left", ["cancelled", "overdue"])
async def test_of_a_read_that_was_left_no_further_chunk_comes_and_the_export_is_released(
    left: str, monkeypatch: pytest.MonkeyPatch, make_pd_side: PdSideMaker, exporter: RemoteExporter
) -> None:
    monkeypatch.setenv("UCX_TLS", TCP)
    await exporter.start_agent(transports=TCP)
    pd_side = await make_pd_side()
    export = await connected(pd_side, exporter)
    reservation = pd_side.reserve("a", NBYTES)
    address = reservation.address
    ctypes.memset(address, 0, NBYTES)
    exporter.freeze()
    deadline_s = 1.0 if left == "overdue" else 20
    reading = pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=deadline_s)
    task = asyncio.create_task(reading)
    await until(lambda: pd_side.reader.in_flight == 1)
    if left == "cancelled":
        task.cancel()
    with pytest.raises(TransferTimeoutError if left == "overdue" else asyncio.CancelledError):
        await task
    assert pd_side.manager.statistics().quarantined_bytes == NBYTES
    exporter.thaw()
    await until(lambda: pd_side.manager.statistics().quarantined == 0)
    asked_for = IN_FLIGHT * CHUNK_BYTES
    assert ctypes.string_at(address + asked_for - 4096, 4096) != bytes(4096)
    assert ctypes.string_at(address + asked_for, NBYTES - asked_for) == bytes(NBYTES - asked_for)
    await until_statistic(exporter, "released", 1)
    assert (await exporter.do("statistics"))["held"] == 0
    pd_side.assert_nothing_leaked()


@pytest.mark.parametrize("place", [0, 2 * CHUNK_BYTES // 4, -1])
async def test_a_value_that_is_not_finite_is_found_in_every_chunk(place: int, pd_side: PdSide) -> None:
    values = torch.zeros(1, (NBYTES - 1000) // 4)
    values[0, place] = float("nan")
    manager = MultimodalEmbeddingCacheManager(2 * NBYTES)
    agent = await TransferAgent.start()
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    exporter = Exporter(agent, lease_timeout_s=30)
    try:
        assert manager.set("made", CachedEmbedding(values))
        lease = manager.lease("made")
        assert lease is not None
        export = await exporter.export(lease)
        with pytest.raises(InvalidEmbeddingError):
            await pd_side.reader.read_into(
                pd_side.reserve("a", values.nbytes),
                agent.metadata,
                export,
                deadline_s=10,
                finite_dtype="float32",
            )
        assert (pd_side.reader.corrupt, pd_side.reader.not_finite) == (0, 1)
        await until(lambda: exporter.acked == 1)
        pd_side.assert_nothing_leaked()
    finally:
        await agent.close(deadline_s=0)
        manager.close()
