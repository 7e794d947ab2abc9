"""Embeddings copied from the mapped arena of an exporter on this machine: what is not in the contract."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

from tests.transfer.conftest import MB, PdSide, PdSideMaker, RemoteMaker, by_mapping, until
from tests.transfer.embedding import embedding
from tests.transfer.remote import RemoteExporter
from trtllm_mm_cache.errors import TransferError
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
    while (await exporter.do("statistics"))["acked"] < 3:
        await asyncio.sleep(0.002)
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
    while (await exporter.do("statistics"))["acked"] < 1:
        await asyncio.sleep(0.002)


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
    while (await exporter.do("statistics"))["held"]:
        await asyncio.sleep(0.002)
    side.pd.assert_nothing_leaked()


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
