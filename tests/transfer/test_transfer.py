"""Embeddings from one process into another: the healthy way, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import random
import secrets
from collections.abc import AsyncIterator

import pytest
import torch
import xxhash

from tests.transfer.conftest import MB, TCP, PdSide, PdSideMaker, by_nixl, until
from tests.transfer.embedding import embedding
from tests.transfer.remote import RemoteExporter, until_statistic
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    InvalidEmbeddingError,
    PeerLostError,
    ProtocolMismatchError,
    TransferError,
)
from trtllm_mm_cache.transfer import Export, Exporter, MappedReader, PeerMetadata, TransferAgent


async def read(pd_side: PdSide, exporter: RemoteExporter, key: str, export: Export) -> Lease:
    reservation = pd_side.reserve(key, export.nbytes)
    await pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=10)
    return reservation.commit(dtype=torch.uint8, shape=(1, export.nbytes))


@pytest.mark.parametrize("transports", [None, TCP])
async def test_bytes_of_every_size_arrive(
    transports: str | None,
    monkeypatch: pytest.MonkeyPatch,
    make_pd_side: PdSideMaker,
    exporter: RemoteExporter,
) -> None:
    if transports is not None:
        monkeypatch.setenv("UCX_TLS", transports)
        await exporter.start_agent(transports=transports)
    pd_side = await make_pd_side()
    for nbytes in (1, 4096, 1 * MB + 1, 10 * MB, 34 * MB):
        key = f"{nbytes} bytes"
        with await read(pd_side, exporter, key, await exporter.export(key, nbytes)) as lease:
            assert torch.equal(lease.tensor.flatten(), embedding(key, nbytes))
    assert pd_side.reader.completed == 5
    assert pd_side.reader.completed_bytes == 1 + 4096 + 1 * MB + 1 + 10 * MB + 34 * MB
    pd_side.assert_nothing_leaked()


async def test_the_read_is_the_ack_that_releases_the_exporters_lease(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await exporter.export("a", 1 * MB)
    before = await exporter.do("statistics")
    assert (before["held"], before["held_bytes"], before["leased_bytes"]) == (1, 1 * MB, 1 * MB)
    (await read(pd_side, exporter, "a", export)).release()
    await until_acked(exporter, 1)
    after = await exporter.do("statistics")
    assert (after["held"], after["leased_bytes"], after["timed_out"], after["unmatched"]) == (0, 0, 0, 0)


async def test_an_ack_of_an_unknown_or_longer_token_releases_nothing(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await exporter.export("a", 1000)
    for token in (export.token + "x", export.token[:-1], "\N{SNOWMAN}"):
        (await read(pd_side, exporter, "a", dataclasses.replace(export, token=token))).release()
    await until_statistic(exporter, "unmatched", 3)
    assert (await exporter.do("statistics"))["held"] == 1


async def test_an_export_is_released_once(exporter: RemoteExporter) -> None:
    export = await exporter.export("a", 1000)
    assert (await exporter.do("release", token=export.token))["held"] is True
    assert (await exporter.do("release", token=export.token))["held"] is False
    statistics = await exporter.do("statistics")
    assert (statistics["released"], statistics["held"], statistics["leased_bytes"]) == (1, 0, 0)


async def test_the_lease_times_out_by_the_clock_and_a_read_after_that_is_caught(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    late = await exporter.export("a", 2 * MB)
    await exporter.do("advance_clock", seconds=29)
    assert (await exporter.do("statistics"))["held"] == 1
    await exporter.do("advance_clock", seconds=1.1)
    await until_statistic(exporter, "timed_out", 1)
    assert (await exporter.do("statistics"))["leased_bytes"] == 0

    await exporter.do("clear")
    other = await exporter.export("b", 2 * MB)
    assert other.address == late.address, "the second embedding was to overwrite the first one"
    with pytest.raises(ChecksumMismatchError):
        await read(pd_side, exporter, "a", late)
    assert pd_side.reader.corrupt == 1
    assert "a" not in pd_side.manager
    pd_side.assert_nothing_leaked()
    (await read(pd_side, exporter, "b", other)).release()


@dataclasses.dataclass
class NearExporter:
    """An encode worker's transfer side in this process, with an agent of its own."""

    manager: MultimodalEmbeddingCacheManager
    agent: TransferAgent
    peer: PeerMetadata
    exporter: Exporter

    def store(self, tensor: torch.Tensor, metadata: EmbeddingMetadata) -> Lease:
        reservation = self.manager.reserve("a", tensor.nbytes, owner="test")
        reservation.write(tensor)
        return reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape), metadata=metadata)


@pytest.fixture
async def near() -> AsyncIterator[NearExporter]:
    manager = MultimodalEmbeddingCacheManager(1 * MB)
    agent = await TransferAgent.start()
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    peer = agent.metadata.with_arena(manager.arena.place)
    yield NearExporter(manager, agent, peer, Exporter(agent, lease_timeout_s=30))
    await agent.close(deadline_s=0)
    manager.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_values_that_are_not_finite_are_the_items_fault_and_not_the_transfers(
    value: float, pd_side: PdSide, near: NearExporter
) -> None:
    lease = near.store(torch.tensor([[1.0, value]]), EmbeddingMetadata())
    for finite_dtype in ("float32", None):
        export = await near.exporter.export(lease.clone())
        reservation = pd_side.reserve("a", 8)
        reading = pd_side.reader.read_into(
            reservation, near.peer, export, deadline_s=10, finite_dtype=finite_dtype
        )
        if finite_dtype is None:
            await reading
            reservation.abandon()
            continue
        with pytest.raises(InvalidEmbeddingError) as raised:
            await reading
        assert not isinstance(raised.value, TransferError)
    assert (pd_side.reader.not_finite, pd_side.reader.corrupt, pd_side.reader.failed) == (1, 0, 0)
    pd_side.assert_nothing_leaked()


async def test_an_export_has_the_checksum_that_its_entry_was_committed_with(near: NearExporter) -> None:
    for checksum, expected in ((7, 7), (None, xxhash.xxh3_64_intdigest(bytes(8)))):
        lease = near.store(torch.zeros(1, 8, dtype=torch.uint8), EmbeddingMetadata(checksum=checksum))
        export = await near.exporter.export(lease)
        assert export.checksum == expected
        assert near.exporter.release(export.token)
        assert lease.released


async def test_what_reader_and_exporter_report(pd_side: PdSide, near: NearExporter) -> None:
    lease = near.store(torch.zeros(1, 8, dtype=torch.uint8), EmbeddingMetadata())
    read_one, released, _ = [await near.exporter.export(lease.clone()) for _ in range(3)]
    near.exporter.release(released.token)
    reservation = pd_side.reserve("a", 8)
    await pd_side.reader.read_into(reservation, near.peer, read_one, deadline_s=10)
    reservation.abandon()
    await until(lambda: near.exporter.acked == 1)
    values = {
        (sample.name.removeprefix("trtllm_mm_cache_"), *sample.labels.values()): sample.value
        for part in (near.exporter, pd_side.reader)
        for metric in part.collect()
        for sample in metric.samples
    }
    if isinstance(pd_side.reader, MappedReader):
        assert (values.pop(("mapped_reads_total",)), values.pop(("mapped_arenas",))) == (1, 1)
    assert values == {
        ("exports_total", "read"): 1,
        ("exports_total", "released"): 1,
        ("exports_total", "timed_out"): 0,
        ("exports_held",): 1,
        ("exports_held_bytes",): 8,
        ("reads_total", "done"): 1,
        ("reads_total", "failed"): 0,
        ("reads_total", "timed_out"): 0,
        ("reads_total", "corrupt"): 0,
        ("reads_total", "not_finite"): 0,
        ("read_bytes_total",): 8,
        ("reads_in_flight",): 0,
        ("reads_unsettled",): 0,
    }


async def test_many_reads_at_once_from_several_tasks(pd_side: PdSide, exporter: RemoteExporter) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    keys = {f"key {index}": rng.choice([512, 64 * 1024, 300_000]) for index in range(20)}
    exports = [(key, await exporter.export(key, nbytes)) for key, nbytes in keys.items() for _ in range(10)]
    rng.shuffle(exports)

    async def worker(share: list[tuple[str, Export]]) -> None:
        for key, export in share:
            with await read(pd_side, exporter, key, export) as lease:
                assert torch.equal(lease.tensor.flatten(), embedding(key, export.nbytes))

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for index in range(8):
            group.create_task(worker(exports[index::8]))
    assert pd_side.reader.completed == 200
    await until_acked(exporter, 200)
    assert pd_side.reader.peers == 1
    pd_side.assert_nothing_leaked()


async def test_a_reservation_of_another_size_is_refused_and_abandoned(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = await exporter.export("a", 1000)
    with pytest.raises(EmbeddingMismatchError):
        await pd_side.reader.read_into(pd_side.reserve("a", 999), exporter.peer, export, deadline_s=5)
    await until_statistic(exporter, "held", 0)
    pd_side.assert_nothing_leaked()


async def test_memory_that_was_not_registered_cannot_be_read(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    export = dataclasses.replace(await exporter.export("a", 1000), address=4096)
    with pytest.raises(TransferError, match="not in registered memory"):
        await read(pd_side, exporter, "a", export)
    await until_statistic(exporter, "held", 0)
    pd_side.assert_nothing_leaked()
    (await read(pd_side, exporter, "b", await exporter.export("b", 1000))).release()


async def test_damaged_metadata_is_refused_before_nixl_sees_it(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    wire = exporter.peer.to_wire()
    assert exporter.peer.arena is not None
    assert PeerMetadata.from_wire(wire) == exporter.peer
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        metadata = bytearray(exporter.peer.metadata)
        metadata[rng.randrange(len(metadata))] ^= 1 << rng.randrange(8)
        with pytest.raises(TransferError, match="damaged"):
            PeerMetadata.from_wire(wire | {"metadata": base64.b64encode(metadata).decode()})
    damaged = [
        {"metadata": wire["metadata"][:-4]},
        {"metadata": "?"},
        {"metadata": "A" * 600_000},
        {"digest": "0" * 64},
        {"agent_name": "another"},
        {"agent_name": "../etc"},
    ]
    for change in damaged:
        with pytest.raises(TransferError):
            PeerMetadata.from_wire(wire | change)
    arenas = ([], {}, wire["arena"] | {"nbytes": "1"}, wire["arena"] | {"path": "/etc"})
    for change in (
        {"version": 2},
        {"version": None},
        {"metadata": None},
        {"digest": 7},
        *({"arena": arena} for arena in arenas),
    ):
        with pytest.raises(ProtocolMismatchError):
            PeerMetadata.from_wire(wire | change)


async def test_metadata_under_another_agents_name_is_refused(
    pd_side: PdSide, exporter: RemoteExporter
) -> None:
    forged = PeerMetadata.of("an-other-name", exporter.peer.metadata)
    export = await exporter.export("a", 1000)
    with pytest.raises(TransferError, match="another agent"):
        await pd_side.reader.read_into(pd_side.reserve("a", 1000), forged, export, deadline_s=5)
    pd_side.assert_nothing_leaked()
    (await read(pd_side, exporter, "a", export)).release()


@by_nixl
async def test_peers_that_come_and_go_are_forgotten(
    make_pd_side: PdSideMaker, exporter: RemoteExporter
) -> None:
    pd_side = await make_pd_side(max_peers=2)
    first = exporter.peer
    for round_trip in range(4):
        key = f"round {round_trip}"
        (await read(pd_side, exporter, key, await exporter.export(key, 1000))).release()
        assert pd_side.reader.peers == min(round_trip + 1, 2)
        await exporter.start_agent()
    with pytest.raises(PeerLostError):
        await pd_side.reader.read_into(
            pd_side.reserve("a", 1000), first, await exporter.export("a", 1000), deadline_s=5
        )
    pd_side.assert_nothing_leaked()


async def until_acked(exporter: RemoteExporter, count: int) -> None:
    await until_statistic(exporter, "acked", count)
