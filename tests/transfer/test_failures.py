"""Bad days of a transfer: dead, frozen and slow exporters, callers that leave, ends in the middle."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import time

import pytest
import torch

from tests.transfer.conftest import MB, TCP, PdSide, PdSideMaker, RemoteMaker, by_nixl, until
from tests.transfer.remote import RemoteExporter
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.errors import ArenaFullError, PeerLostError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer import Export, Reader, TransferAgent
from trtllm_mm_cache.transfer.reads import CHUNK_BYTES

NBYTES = 40 * MB  # more than half of the PD side's arena, so that two do not fit


async def read(pd_side: PdSide, exporter: RemoteExporter, export: Export, *, deadline_s: float = 20) -> None:
    reservation = pd_side.reserve(export.token, export.nbytes)
    await pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=deadline_s)
    reservation.commit(dtype=torch.uint8, shape=(1, export.nbytes)).release()
    pd_side.manager.drop(export.token)


async def begin_read(pd_side: PdSide, exporter: RemoteExporter, export: Export) -> asyncio.Task[None]:
    """Start a READ and return when NIXL has it."""
    task = asyncio.create_task(read(pd_side, exporter, export))
    await until(lambda: pd_side.reader.in_flight == 1)
    return task


@pytest.fixture
async def tcp_side(monkeypatch: pytest.MonkeyPatch, make_pd_side: PdSideMaker) -> PdSide:
    """A PD side that talks TCP: there a READ from a frozen process has moved nothing yet."""
    monkeypatch.setenv("UCX_TLS", TCP)
    return await make_pd_side()


@pytest.fixture
async def tcp_exporter(exporter: RemoteExporter) -> RemoteExporter:
    return await exporter.start_agent(transports=TCP)


@by_nixl
async def test_a_killed_exporter_is_lost_and_its_successor_serves_at_once(
    pd_side: PdSide, make_exporter_process: RemoteMaker
) -> None:
    exporter, successor = make_exporter_process(), make_exporter_process()
    await exporter.start_agent()
    await successor.start_agent()
    await read(pd_side, exporter, await exporter.export("a", 1000))
    export = await exporter.export("b", NBYTES)
    exporter.kill()
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(PeerLostError):
            await read(pd_side, exporter, export)
    assert time.monotonic() - began < 5
    pd_side.assert_nothing_leaked()
    assert pd_side.reader.peers == 0

    await read(pd_side, successor, await successor.export("b", NBYTES), deadline_s=2)
    pd_side.assert_nothing_leaked()


@by_nixl
@pytest.mark.parametrize("connected", [True, False])
async def test_an_exporter_killed_in_the_middle_of_a_read_is_lost(
    connected: bool, tcp_side: PdSide, make_exporter_process: RemoteMaker
) -> None:
    exporter = await make_exporter_process().start_agent(transports=TCP)
    if connected:
        await read(tcp_side, exporter, await exporter.export("a", 1000))
    exports = [await exporter.export(key, 16 * MB) for key in ("b", "c")]
    exporter.freeze()
    tasks = [asyncio.create_task(read(tcp_side, exporter, export)) for export in exports]
    await until(lambda: tcp_side.reader.in_flight == 2)
    exporter.kill()
    async with asyncio.timeout(10):
        for task in tasks:
            with pytest.raises(PeerLostError):
                await task
    tcp_side.assert_nothing_leaked()
    assert tcp_side.reader.peers == 0


@by_nixl
async def test_a_frozen_exporter_costs_the_deadline_and_its_extent_until_it_wakes(
    tcp_side: PdSide, tcp_exporter: RemoteExporter
) -> None:
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("a", 1000))
    export = await tcp_exporter.export("b", NBYTES)
    tcp_exporter.freeze()
    with pytest.raises(TransferTimeoutError):
        await read(tcp_side, tcp_exporter, export, deadline_s=0.2)
    assert tcp_side.manager.statistics().quarantined_bytes == NBYTES
    with pytest.raises(ArenaFullError):
        tcp_side.reserve("c", NBYTES)
    assert tcp_side.reader.unsettled == 1

    # Nothing more is asked of it meanwhile: that would tie up another extent each time.
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match="overdue"):
        await read(tcp_side, tcp_exporter, Export(export.token, export.address, 1000, 0))
    assert time.monotonic() - began < 1
    assert tcp_side.manager.statistics().quarantined == 1

    tcp_exporter.thaw()
    await until(lambda: tcp_side.manager.statistics().quarantined == 0)
    tcp_side.assert_nothing_leaked()
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("b", NBYTES))


@by_nixl
async def test_a_cancelled_read_keeps_its_extent_until_it_has_settled(
    tcp_side: PdSide, tcp_exporter: RemoteExporter
) -> None:
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("a", 1000))
    export = await tcp_exporter.export("b", NBYTES)
    tcp_exporter.freeze()
    task = await begin_read(tcp_side, tcp_exporter, export)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tcp_side.manager.statistics().quarantined_bytes == NBYTES
    tcp_exporter.thaw()
    await until(lambda: tcp_side.manager.statistics().quarantined == 0)
    tcp_side.assert_nothing_leaked()


async def test_cancelling_at_any_moment_leaks_nothing(pd_side: PdSide, exporter: RemoteExporter) -> None:
    export = await exporter.export("a", 2 * MB)
    finished = 0
    for step in range(40):
        task = asyncio.create_task(read(pd_side, exporter, export))
        await asyncio.sleep(step * 0.0001)
        task.cancel()
        await asyncio.wait({task})
        finished += not task.cancelled()
        await until(lambda: pd_side.manager.statistics().quarantined == 0)
    assert finished < 40
    await until(lambda: pd_side.manager.statistics().reservations == 0)
    pd_side.assert_nothing_leaked()


@by_nixl
async def test_a_peer_that_nixl_forgot_in_the_middle_of_a_read_is_read_from_again(
    tcp_side: PdSide, tcp_exporter: RemoteExporter
) -> None:
    """NIXL says nothing more of that READ, but its bytes still come: its extent is lost, the peer is not."""
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("a", 1000))
    export = await tcp_exporter.export("b", NBYTES)
    tcp_exporter.freeze()
    reservation = tcp_side.reserve("b", NBYTES)
    address = reservation.address
    ctypes.memset(address, 0, NBYTES)
    forgotten = asyncio.create_task(
        tcp_side.reader.read_into(reservation, tcp_exporter.peer, export, deadline_s=20)
    )
    await until(lambda: tcp_side.reader.in_flight == 1)
    await forget(tcp_side, tcp_exporter)
    with pytest.raises(PeerLostError):
        await forgotten
    tcp_exporter.thaw()

    await read(tcp_side, tcp_exporter, await tcp_exporter.export("c", 1000))
    await until(lambda: ctypes.string_at(address + CHUNK_BYTES - 4096, 4096) != bytes(4096))
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("d", 1000))
    assert tcp_side.manager.statistics().quarantined_bytes == NBYTES
    assert (tcp_side.reader.in_flight, tcp_side.reader.unsettled, tcp_side.reader.peers) == (1, 1, 1)

    await tcp_side.agent.close(deadline_s=5)
    assert tcp_side.manager.statistics().quarantined_bytes == NBYTES


@by_nixl
async def test_a_peer_that_nixl_forgot_while_idle_costs_one_read(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    await read(pd_side, exporter, await exporter.export("a", 1000))
    await forget(pd_side, exporter)
    export = await exporter.export("b", 1000)
    with pytest.raises(PeerLostError):
        await read(pd_side, exporter, export)
    await read(pd_side, exporter, export)
    pd_side.assert_nothing_leaked()


async def forget(pd_side: PdSide, exporter: RemoteExporter) -> None:
    """Have NIXL forget the exporter behind the reader's back."""
    removed = pd_side.agent.call(lambda nixl: nixl.remove_remote_agent(exporter.peer.agent_name))
    await asyncio.wrap_future(removed)


@by_nixl
async def test_closing_leaves_a_read_in_flight_alone_and_harms_neither_side(
    tcp_side: PdSide, tcp_exporter: RemoteExporter
) -> None:
    await read(tcp_side, tcp_exporter, await tcp_exporter.export("a", 1000))
    export = await tcp_exporter.export("b", NBYTES)
    tcp_exporter.freeze()
    reservation = tcp_side.reserve("b", NBYTES)
    address = reservation.address
    ctypes.memset(address, 0, NBYTES)
    task = asyncio.create_task(
        tcp_side.reader.read_into(reservation, tcp_exporter.peer, export, deadline_s=20)
    )
    await until(lambda: tcp_side.reader.in_flight == 1)
    began = time.monotonic()
    await tcp_side.agent.close(deadline_s=0.2)
    assert 0.2 <= time.monotonic() - began < 3
    with pytest.raises(TransferError, match="closed"):
        await task
    assert tcp_side.manager.statistics().quarantined_bytes == NBYTES

    tcp_exporter.thaw()  # UCX would have it abort, had the agent been destroyed with the READ in flight
    assert (await tcp_exporter.do("statistics"))["acked"] == 1
    assert ctypes.string_at(address, NBYTES) == bytes(NBYTES)
    with pytest.raises(TransferError, match="closed"):
        await read(tcp_side, tcp_exporter, Export(export.token, export.address, 1000, 0))
    assert tcp_side.manager.statistics().reservations == 0


async def test_an_agent_that_nobody_refers_to_still_harms_no_exporter(
    monkeypatch: pytest.MonkeyPatch, tcp_exporter: RemoteExporter
) -> None:
    monkeypatch.setenv("UCX_TLS", TCP)
    arena = Arena(NBYTES)
    export = await tcp_exporter.export("a", NBYTES)

    async def close_in_the_middle_of_a_read() -> None:
        agent = await TransferAgent.start()
        await agent.register(arena.base_address, NBYTES)
        reader = Reader(agent)
        small = dataclasses.replace(export, nbytes=1000, token="a")
        connected = reader.begin(tcp_exporter.peer, small, arena.base_address, deadline_s=10)
        await asyncio.wrap_future(connected.outcome)
        tcp_exporter.freeze()
        reader.begin(tcp_exporter.peer, export, arena.base_address, deadline_s=10)
        await until(lambda: reader.in_flight == 1)
        await agent.close(deadline_s=0)

    await close_in_the_middle_of_a_read()
    gc.collect()
    tcp_exporter.thaw()
    assert (await tcp_exporter.do("statistics"))["held"] == 1
    arena.close()


async def test_closing_waits_for_the_exports_that_are_about_to_be_read(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await exporter.export("a", 1000)
    closing = asyncio.create_task(exporter.do("close", deadline_s=10))
    await asyncio.sleep(0)
    await read(pd_side, exporter, export)
    assert (await closing)["seconds"] < 5
    statistics = await exporter.do("statistics")
    assert (statistics["acked"], statistics["held"], statistics["leased_bytes"]) == (1, 0, 0)


async def test_closing_releases_exports_that_nobody_reads(exporter: RemoteExporter) -> None:
    await exporter.export("a", 1000)
    assert (await exporter.do("close", deadline_s=0.1))["seconds"] >= 0.1
    statistics = await exporter.do("statistics")
    assert (statistics["acked"], statistics["held"], statistics["leased_bytes"]) == (0, 0, 0)
