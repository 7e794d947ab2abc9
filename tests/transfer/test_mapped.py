"""Embeddings copied from the mapped arena of an exporter on this machine: what is not in the contract."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.transfer.conftest import MB, PdSide, PdSideMaker, RemoteMaker, by_mapping, until
from tests.transfer.embedding import embedding
from tests.transfer.remote import RemoteExporter, until_statistic
from trtllm_mm_cache.errors import ChecksumMismatchError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer import Export, MappedReader, PeerMetadata, finite

pytestmark = by_mapping

NBYTES = 20 * MB


@dataclasses.dataclass
class Side:
    """A PD side and the reader that it has, by its own type."""

    pd: PdSide
    reader: MappedReader

    async def read(self, peer: PeerMetadata, key: str, export: Export) -> None:
        """Read an export and compare it with what it has to be."""
        reservation = self.pd.reserve(key, export.nbytes)
        await self.reader.read_into(reservation, peer, export, deadline_s=10)
        with reservation.commit(dtype=torch.uint8, shape=(1, export.nbytes)) as lease:
            assert torch.equal(lease.tensor.flatten(), embedding(key, export.nbytes))
        self.pd.manager.drop(key)

    @property
    def ways(self) -> tuple[int, int]:
        """How many came by mapping, and how many by NIXL."""
        return self.reader.mapped, self.reader.completed - self.reader.mapped


@pytest.fixture
def side(pd_side: PdSide) -> Side:
    assert isinstance(pd_side.reader, MappedReader)
    return Side(pd_side, pd_side.reader)


def elsewhere(peer: PeerMetadata, **changed: object) -> PeerMetadata:
    assert peer.arena is not None
    return peer.with_arena(dataclasses.replace(peer.arena, **changed))  # type: ignore[arg-type]


async def test_an_exporter_on_this_machine_is_copied_from_and_nothing_is_asked_of_nixl(
    side: Side, exporter: RemoteExporter
) -> None:
    for key in "abc":
        await side.read(exporter.peer, key, await exporter.export(key, NBYTES))
    assert side.ways == (3, 0)
    assert (side.reader.arenas, side.reader.completed_bytes) == (1, 3 * NBYTES)
    await until_statistic(exporter, "acked", 3)
    side.pd.assert_nothing_leaked()
    assert (await exporter.do("statistics"))["leased_bytes"] == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"machine": "another"}, ""),
        ({"file": "torch_1_1_1"}, "cannot be opened"),
        ({"file": "../../etc/passwd"}, "impossible name"),
        ({"identity": 32 * "0"}, "another arena"),
        ({"nbytes": 2**40}, "another size"),
    ],
)
async def test_what_is_not_certain_to_be_the_exporters_arena_is_read_by_nixl(
    changed: dict[str, object],
    reason: str,
    side: Side,
    exporter: RemoteExporter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = elsewhere(exporter.peer, **changed)
    for key in "ab":
        await side.read(peer, key, await exporter.export(key, 1 * MB))
    assert side.ways == (0, 2)
    warned = [record.getMessage() for record in caplog.records if "not mapped" in record.getMessage()]
    assert len(warned) == (1 if reason else 0)  # once an arena, not once a read
    assert all(reason in line for line in warned)


async def test_the_arena_of_a_worker_that_was_restarted_is_another_one(
    side: Side, make_exporter_process: RemoteMaker
) -> None:
    old, new = make_exporter_process(), make_exporter_process()
    await old.start_agent()
    await side.read(old.peer, "a", await old.export("a", 1 * MB))
    await new.start_agent()
    assert old.peer.arena is not None
    # As if the new worker's file had got the old one's name: by its identity it is not taken for that.
    peer = elsewhere(new.peer, file=old.peer.arena.file)
    await side.read(peer, "b", await new.export("b", 1 * MB))
    assert side.ways == (1, 1)
    await side.read(new.peer, "c", await new.export("c", 1 * MB))


async def test_who_tells_a_false_beginning_of_its_arena_harms_that_read_alone(
    side: Side, exporter: RemoteExporter
) -> None:
    assert exporter.peer.arena is not None
    false = elsewhere(exporter.peer, address=exporter.peer.arena.address - 4096)
    with pytest.raises(ChecksumMismatchError):
        await side.read(false, "a", await exporter.export("a", 1000))
    await side.read(exporter.peer, "b", await exporter.export("b", 1000))
    assert side.ways == (1, 1)


async def test_a_worker_that_dies_while_it_is_read_from_harms_no_reader_and_its_memory_is_let_go(
    monkeypatch: pytest.MonkeyPatch, side: Side, make_exporter_process: RemoteMaker
) -> None:
    exporter = make_exporter_process()
    await exporter.start_agent()
    first, second = await exporter.export("a", NBYTES), await exporter.export("b", NBYTES)
    copy, copies = finite._memmove, 0

    def killing(target: int, source: int, nbytes: int) -> int:
        nonlocal copies
        copies += 1
        if copies == 2:
            exporter.kill()
        copied: int = copy(target, source, nbytes)
        return copied

    monkeypatch.setattr(finite, "_memmove", killing)
    await side.read(exporter.peer, "a", first)
    assert copies > 2
    assert exporter.peer.arena is not None
    await side.read(exporter.peer, "b", second)
    file = Path("/dev/shm", exporter.peer.arena.file)  # noqa: S108
    await until(lambda: not file.exists() and side.reader.arenas == 0)
    side.pd.assert_nothing_leaked()


async def test_a_frozen_worker_is_read_from(side: Side, exporter: RemoteExporter) -> None:
    export = await exporter.export("a", NBYTES)
    exporter.freeze()
    await side.read(exporter.peer, "a", export)
    exporter.thaw()
    await until_statistic(exporter, "acked", 1)


async def test_a_copy_that_is_cut_off_releases_the_export_and_the_extent(
    side: Side, exporter: RemoteExporter
) -> None:
    export = await exporter.export("a", NBYTES)
    task = asyncio.create_task(side.read(exporter.peer, "a", export))
    await asyncio.sleep(0)
    assert side.reader.in_flight == 1
    task.cancel()
    await asyncio.wait({task})
    await until(lambda: side.reader.in_flight == 0)
    await until_statistic(exporter, "held", 0)
    side.pd.assert_nothing_leaked()


@pytest.mark.parametrize(("nbytes", "on_the_loop"), [(1024**2, True), (1024**2 + 64, False)])
async def test_only_what_takes_no_longer_than_a_hand_over_is_copied_on_the_event_loop(
    nbytes: int, on_the_loop: bool, side: Side, exporter: RemoteExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, threads = finite._memmove, set[str]()

    def noting(target: int, source: int, nbytes: int) -> int:
        threads.add(threading.current_thread().name)
        copied: int = copy(target, source, nbytes)
        return copied

    monkeypatch.setattr(finite, "_memmove", noting)
    await side.read(exporter.peer, "a", await exporter.export("a", nbytes))
    assert len(threads) == 1
    assert (threads == {threading.current_thread().name}) is on_the_loop


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Every copy of pieces halts at its second: `reached` says that one does, `go_on` ends it."""
    copy, pieces = finite._memmove, 0
    reached, go_on = threading.Event(), threading.Event()

    def halting(target: int, source: int, nbytes: int) -> int:
        nonlocal pieces
        pieces += nbytes > 1000
        if pieces == 2 and not reached.is_set():
            reached.set()
            assert go_on.wait(30)
        copied: int = copy(target, source, nbytes)
        return copied

    monkeypatch.setattr(finite, "_memmove", halting)
    yield reached, go_on
    go_on.set()


@pytest.mark.parametrize("cut", ["cancelled", "overdue"])
async def test_what_is_cut_off_in_the_middle_of_a_copy_is_kept_until_that_has_ended(
    cut: str, halted: tuple[threading.Event, threading.Event], side: Side, exporter: RemoteExporter
) -> None:
    """The extent, which is still written to, and the exporter's, which is still read."""
    reached, go_on = halted
    export = await exporter.export("a", NBYTES)
    reservation = side.pd.reserve("a", NBYTES)
    deadline_s = 0.2 if cut == "overdue" else 20
    reading = side.reader.read_into(reservation, exporter.peer, export, deadline_s=deadline_s)
    task = asyncio.create_task(reading)
    await until(reached.is_set)
    if cut == "cancelled":
        task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(TransferTimeoutError if cut == "overdue" else asyncio.CancelledError):
            await task
    for _ in range(20):  # what was said too early has time to arrive
        await asyncio.sleep(0.005)
        assert (await exporter.do("statistics"))["held"] == 1
        assert (side.pd.manager.statistics().reservations, side.reader.in_flight) == (1, 1)
    go_on.set()
    await until(lambda: side.reader.in_flight == 0)
    await until_statistic(exporter, "held", 0)
    assert side.reader.timed_out == (1 if cut == "overdue" else 0)
    side.pd.assert_nothing_leaked()


async def test_the_mapping_of_an_arena_that_is_let_go_stays_until_the_copy_has_ended(
    halted: tuple[threading.Event, threading.Event], side: Side, make_exporter_process: RemoteMaker
) -> None:
    """Nobody waits for the copy any more, and the worker is dead: without its mapping it were a fault."""
    reached, go_on = halted
    exporter = await make_exporter_process().start_agent()
    assert exporter.peer.arena is not None
    file = exporter.peer.arena.file
    task = asyncio.create_task(side.read(exporter.peer, "a", await exporter.export("a", NBYTES)))
    await until(reached.is_set)
    task.cancel()
    await asyncio.wait({task})
    del task  # its error's traceback leads to the mapping
    exporter.kill()
    await until(lambda: side.reader.arenas == 0)
    assert is_mapped(file)
    go_on.set()
    await until(lambda: not is_mapped(file))
    side.pd.assert_nothing_leaked()


async def test_closing_waits_for_a_copy_and_its_exporter_is_told(
    halted: tuple[threading.Event, threading.Event], side: Side, exporter: RemoteExporter
) -> None:
    reached, go_on = halted
    await side.read(exporter.peer, "first", await exporter.export("first", 1000))
    await until_statistic(exporter, "acked", 1)
    task = asyncio.create_task(side.read(exporter.peer, "a", await exporter.export("a", NBYTES)))
    await until(reached.is_set)
    closing = asyncio.create_task(side.pd.agent.close(deadline_s=10))
    for _ in range(20):  # an end that comes too early has time to come
        await asyncio.sleep(0.005)
    go_on.set()
    await task
    await closing
    await until_statistic(exporter, "acked", 2)


def is_mapped(file: str) -> bool:
    return file in Path("/proc/self/maps").read_text()


async def test_after_the_agents_end_nothing_is_copied(side: Side, exporter: RemoteExporter) -> None:
    export = await exporter.export("a", 1000)
    await side.pd.agent.close(deadline_s=1)
    with pytest.raises(TransferError, match="closed"):
        await side.read(exporter.peer, "a", export)
    side.pd.assert_nothing_leaked()


async def test_only_so_many_arenas_are_kept(
    make_pd_side: PdSideMaker, make_exporter_process: RemoteMaker
) -> None:
    pd_side = await make_pd_side(max_peers=1)
    assert isinstance(pd_side.reader, MappedReader)
    side = Side(pd_side, pd_side.reader)
    for _ in range(2):
        exporter = await make_exporter_process().start_agent()
        await side.read(exporter.peer, "a", await exporter.export("a", 1000))
        assert side.reader.arenas == 1
    assert side.ways == (2, 0)
