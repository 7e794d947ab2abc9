"""Every manager made in a cache test is checked and closed after it; every stage of flights ends empty."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cache.flight_stage import Stage, turns
from tests.remembering import remember_managers
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager


@pytest.fixture(autouse=True)
def checked_managers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MultimodalEmbeddingCacheManager]]:
    made: list[MultimodalEmbeddingCacheManager] = []
    remember_managers(monkeypatch, made.append)
    yield made
    for manager in made:
        manager.check_integrity()
        manager.close()
        manager.check_integrity()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """After every test: no share without an owner, no flight, no complaint to the event loop."""
    complaints: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
    stage = Stage()
    yield stage
    await stage.flights.close(timeout_s=5)
    await turns()
    stage.callers.clear()
    gc.collect(1)  # a future complains when it is collected
    assert (stage.flights.in_flight, stage.flights.waiters) == (0, 0)
    assert stage.owners.alive == 0, "a share has no owner"
    assert complaints == []
