"""From arena to arena: how often the bytes are copied by each way, and that no memory is made for them."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable

import pytest
import torch

from tests.transfer.conftest import MB, PdSide, by_mapping
from tests.transfer.embedding import embedding
from tests.transfer.remote import RemoteExporter, until_statistic
from trtllm_mm_cache.transfer import MappedReader, finite

NBYTES = 24 * MB
PAGES = NBYTES // 4096


@pytest.fixture
def on_copy(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[Callable[[], None]]]:
    """The sizes of the copies by the C function itself, and what to do, once each, before the next one."""
    sizes: list[int] = []
    acts: list[Callable[[], None]] = []
    real: Callable[[int, int, int], int] = finite._memmove

    def counted(target: int, source: int, nbytes: int) -> int:
        sizes.append(nbytes)
        while acts:
            acts.pop()()
        return real(target, source, nbytes)

    monkeypatch.setattr(finite, "_memmove", counted)
    return sizes, acts


async def read(pd_side: PdSide, exporter: RemoteExporter, key: str) -> int:
    """Read an embedding, compare it, and return the page faults from its reservation to its commit."""
    export = await exporter.export(key, NBYTES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reservation = pd_side.reserve(key, NBYTES)
    await pd_side.reader.read_into(reservation, exporter.peer, export, deadline_s=20)
    lease = reservation.commit(dtype=torch.uint8, shape=(1, NBYTES))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    with lease:
        assert torch.equal(lease.tensor.flatten(), embedding(key, NBYTES))
    pd_side.manager.drop(key)
    return faults


async def test_an_embedding_is_copied_once_by_us_or_by_nixl_and_no_memory_is_made_for_it(
    pd_side: PdSide, exporter: RemoteExporter, on_copy: tuple[list[int], list[Callable[[], None]]]
) -> None:
    await read(pd_side, exporter, "first")  # connects, or maps
    on_copy[0].clear()
    assert await read(pd_side, exporter, "second") < PAGES / 10
    by_us = isinstance(pd_side.reader, MappedReader)
    assert sum(on_copy[0]) == (NBYTES if by_us else 0)
    assert pd_side.reader.completed_bytes == 2 * NBYTES


@by_mapping
async def test_the_exporters_lease_holds_until_the_last_byte_is_copied(
    pd_side: PdSide, exporter: RemoteExporter, on_copy: tuple[list[int], list[Callable[[], None]]]
) -> None:
    await read(pd_side, exporter, "first")
    await until_statistic(exporter, "acked", 1)
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    async def look() -> None:
        for _ in range(20):  # an ack that was sent too early has time to arrive
            await asyncio.sleep(0.005)
        seen.append((await exporter.do("statistics"))["held"])

    on_copy[1].append(lambda: asyncio.run_coroutine_threadsafe(look(), loop).result(10))
    await read(pd_side, exporter, "second")
    assert seen == [1]
    await until_statistic(exporter, "acked", 2)
