"""A PD worker's transfer side in the test's process, and real exporter processes beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.transfer.remote import RemoteExporter
from tests.transports import over_tcp
from tests.unasked import no_error_is_left_to_asyncio  # noqa: F401
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.transfer import MappedReader, Reader, TransferAgent

MB = 1024**2
TCP = over_tcp()
ARENA_BYTES = 64 * MB


async def until(condition: Callable[[], bool], *, deadline_s: float = 10.0) -> None:
    """Wait for `condition`, looking every 2 ms."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.002)


@dataclass
class PdSide:
    """What a PD worker has: an arena, a NIXL agent, a reader."""

    manager: MultimodalEmbeddingCacheManager
    agent: TransferAgent
    reader: Reader

    def reserve(self, key: str, nbytes: int) -> Reservation:
        return self.manager.reserve(key, nbytes, owner="test")

    def assert_nothing_leaked(self) -> None:
        statistics = self.manager.statistics()
        assert (statistics.reservations, statistics.quarantined, statistics.forgotten) == (0, 0, 0)
        assert statistics.arena.used_bytes == statistics.current_bytes
        assert self.reader.in_flight == 0
        self.manager.check_integrity()


PdSideMaker = Callable[..., Awaitable[PdSide]]


READERS: dict[str, type[Reader]] = {"auto": MappedReader, "nixl": Reader}
"""By `--transfer`."""


@pytest.fixture(params=READERS)
async def make_pd_side(request: pytest.FixtureRequest) -> AsyncIterator[PdSideMaker]:
    """PD sides that read both ways: what a test says of one holds of the other, unless it asks for one."""
    sides: list[PdSide] = []

    async def make(*, max_peers: int = 16) -> PdSide:
        manager = MultimodalEmbeddingCacheManager(ARENA_BYTES)
        agent = await TransferAgent.start()
        await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
        sides.append(PdSide(manager, agent, READERS[request.param](agent, max_peers=max_peers)))
        return sides[-1]

    yield make
    for side in sides:
        await side.agent.close(deadline_s=0)
        side.manager.check_integrity()
        side.manager.close()


@pytest.fixture
async def pd_side(make_pd_side: PdSideMaker) -> PdSide:
    return await make_pd_side()


by_nixl = pytest.mark.parametrize("make_pd_side", ["nixl"], indirect=True)
by_mapping = pytest.mark.parametrize("make_pd_side", ["auto"], indirect=True)


RemoteMaker = Callable[[], RemoteExporter]


@pytest.fixture
def make_exporter_process() -> Iterator[RemoteMaker]:
    """Exporter processes without an agent yet, for tests that kill them."""
    processes: list[RemoteExporter] = []

    def make() -> RemoteExporter:
        processes.append(RemoteExporter(capacity_bytes=ARENA_BYTES))
        return processes[-1]

    yield make
    for process in processes:
        process.close()


@pytest.fixture(scope="session")
def exporter_process() -> Iterator[RemoteExporter]:
    """One exporter process for the many tests that leave it alive: starting one takes seconds."""
    process = RemoteExporter(capacity_bytes=ARENA_BYTES)
    yield process
    process.close()


@pytest.fixture
async def exporter(exporter_process: RemoteExporter) -> AsyncIterator[RemoteExporter]:
    """The shared process with a new agent, an empty cache and a new exporter."""
    yield await exporter_process.start_agent()
    exporter_process.thaw()
