"""Tiers behind a PD worker's resolver and inside an encode worker: order, failures, drop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from tests.e2e.stack import free_port
from tests.pd.bench import (
    FINGERPRINT,
    NBYTES,
    allow_private_addresses,
    assert_holds,
    check_embedding,
    image_url,
    require_salt,
    settings,
)
from tests.pd.bench import Bench as PdBench
from tests.pd.bench import bench as pd_bench
from tests.tiers.bench import until
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ConfigurationError, EncodeUnavailableError, MmCacheError
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.control import DropRequest
from trtllm_mm_cache.settings import PdSettings, TierSettings
from trtllm_mm_cache.tiers.chain import StoredTiers, TierChain
from trtllm_mm_cache.tiers.configured import check_tiers, stored_tiers
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.tiers.stored import StoredTier

__all__ = ["allow_private_addresses", "pd_bench", "require_salt", "settings"]

pytest.importorskip("redis", reason="the store's client is not installed: the extra `store`")

from trtllm_mm_cache.tiers.store import StoreStorage


def tier_settings(folder: Path | None, port: int | None, **more: Any) -> TierSettings:
    secret = None
    if folder is not None:
        secret = folder.parent / "secret"
        secret.write_text("s" * 40)
        secret.chmod(0o600)
    return TierSettings(
        multimodal_embedding_cache_disk_path=folder,
        multimodal_embedding_cache_store_url=None if port is None else SecretStr(f"redis://127.0.0.1:{port}"),
        multimodal_embedding_cache_secret_file=secret,
        **more,
    )


class Worker:
    """A PD worker that begins with an empty arena: the bench's peer and arenas, tiers of its own."""

    def __init__(self, bench: PdBench, pd: PdSettings, tiers: StoredTiers) -> None:
        self.bench, self.tiers = bench, tiers
        for tier in tiers._tiers:  # this machine may be busy; deadlines have their own tests
            tier._limits = replace(tier._limits, lookup_s=10.0, fetch_s=10.0)
            if isinstance(tier._storage, StoreStorage):
                tier._storage._nodes._options |= {"socket_timeout": 10, "socket_connect_timeout": 10}
        bench.cache.clear()
        metrics = PdMetrics()
        self.misses = TierChain([bench.tier], bench.receiver, tiers)
        self.resolver = ItemResolver(bench.cache, None, self.misses, FINGERPRINT, pd, metrics)

    @property
    def stored(self) -> list[StoredTier]:
        return list(self.tiers._tiers)

    async def ask(self, url: str, *, salt: str | None = None) -> None:
        from tests.pd.bench import asking

        resolved = await self.resolver.resolve(asking([url], salt=salt), variant="")
        for lease in resolved.leases:
            assert_holds(lease)
        resolved.release()

    async def settled(self) -> None:
        for tier in self.stored:
            await until(lambda: tier.offers.waiting == (0, 0))  # noqa: B023

    def encodes(self) -> int:
        return len(self.bench.peer.calls)


@pytest.fixture
async def workers(
    pd_bench: PdBench, settings: PdSettings, folder: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Any]:
    made: list[Worker] = []

    def make(*, disk: bool = True, store: bool = False, order: tuple[int, ...] | None = None) -> Worker:
        port = request.getfixturevalue("redis_server") if store else None
        wanted = tier_settings(folder, port)
        tiers = stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[64 * NBYTES])
        kept = list(tiers._tiers)[0 if disk else 1 :]
        if order:
            kept = [kept[index] for index in order]
        made.append(Worker(pd_bench, settings, StoredTiers(kept)))
        return made[-1]

    yield make
    for worker in made:
        await worker.tiers.close()
        await worker.misses.flights.close()
        await worker.resolver._fetcher.close()


async def test_a_restart_costs_no_encode(workers: Any) -> None:
    url, once = image_url(), image_url()
    worker = workers()
    await worker.ask(once)
    for _ in range(2):
        await worker.ask(url)
    await worker.settled()
    await worker.tiers.close()
    assert worker.encodes() == 2
    again = workers()
    await again.ask(url)
    assert worker.encodes() == 2
    await again.ask(once)
    assert worker.encodes() == 3, "what was used once was not worth a write"


@pytest.mark.parametrize("order", list(permutations(range(2))))
async def test_every_order_of_tiers(workers: Any, order: tuple[int, ...]) -> None:
    worker = workers(store=True, order=order)
    url = image_url()
    for _ in range(2):
        await worker.ask(url)
    await worker.settled()
    assert [tier.offers.outcomes["stored"] for tier in worker.stored] == [1, 1]
    near, far = worker.stored
    worker.bench.cache.clear()
    await worker.ask(url)
    assert (near.lookups["hit"], far.lookups["hit"], worker.encodes()) == (1, 0, 1)
    # The nearer one has lost it, and gets it back from the farther one.
    near._storage.drop(*_everything(near))
    near.offers.drop(_everything(near)[0])
    worker.bench.cache.clear()
    for _ in range(2):
        await worker.ask(url)
    await worker.settled()
    assert (near.offers.outcomes["stored"], far.lookups["hit"], worker.encodes()) == (2, 1, 1)
    await worker.resolver.drop(DropRequest(everything=True))
    await worker.ask(url)
    assert worker.encodes() == 2


def _everything(tier: StoredTier) -> tuple[Any, Any]:
    from trtllm_mm_cache.cache.scope import Selection

    return Selection(), tier._rules.authentic


def damage(folder: Path) -> None:
    for file in folder.rglob("*"):
        if len(file.name) == 64:
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")


async def test_with_every_tier_broken_the_encode_worker_is_asked(workers: Any, folder: Path) -> None:
    worker = workers()
    url = image_url()
    for _ in range(2):
        await worker.ask(url)
    await worker.settled()
    damage(folder)
    worker.bench.cache.clear()
    await worker.ask(url)
    assert worker.encodes() == 2
    assert worker.stored[0].counts.refused == {"damaged": 1}


async def test_drop_reaches_the_tiers_and_bars_what_is_dropped_until_the_last_round(workers: Any) -> None:
    worker = workers()
    url, other = image_url(), image_url()
    for _ in range(2):
        await worker.ask(url)
        await worker.ask(other)
    await worker.settled()
    first = await worker.resolver.drop(DropRequest(everything=True, bar_s=60))
    assert (first.entries, first.stored, first.stored_bytes) == (2, 2, 2 * NBYTES)
    for _ in range(3):
        await worker.ask(url)
    await worker.settled()
    assert worker.encodes() == 2 + 3, "served and not retained"
    last = await worker.resolver.drop(DropRequest(everything=True))
    assert (last.entries, last.stored) == (0, 0)
    for _ in range(3):
        await worker.ask(url)
    assert worker.encodes() == 2 + 3 + 1
    await worker.settled()
    assert worker.stored[0]._storage.contents().entries == 1


async def test_what_one_worker_dropped_does_not_come_back_by_another_ones_offer(
    workers: Any, pd_bench: PdBench, settings: PdSettings, redis_server: int, folder: Path
) -> None:
    """Two workers and a store. One drops; before the other does, it stores the embedding again."""
    one = workers(disk=False, store=True)
    url = image_url()
    for _ in range(2):
        await one.ask(url)
    await one.settled()
    arena = MultimodalEmbeddingCacheManager(4 * NBYTES, name="other")
    receiver = Receiver(arena, pd_bench.transit, None, check_embedding, CollectorRegistry())
    tiers = stored_tiers(
        tier_settings(folder, redis_server), FINGERPRINT, CollectorRegistry(), arenas=[NBYTES]
    )
    store = StoredTiers([tiers._tiers[1]])
    other = Worker(replace(pd_bench, cache=arena, receiver=receiver), settings, store)
    await other.ask(url)
    assert (other.stored[0].lookups["hit"], one.encodes()) == (1, 1)

    barring = DropRequest(everything=True, bar_s=60)
    assert (await one.resolver.drop(barring)).stored == 1
    other.stored[0].offers._clock = lambda: time.monotonic() + 1000  # a touch is due
    await other.ask(url)
    await other.settled()
    assert other.stored[0].offers.outcomes["stored"] == 1, "it is in the store again"
    await one.ask(url)
    assert (one.encodes(), len(pd_bench.cache.keys())) == (2, 0), "and is not taken from there"
    assert (await other.resolver.drop(barring)).stored == 1
    for worker in (one, other):
        assert (await worker.resolver.drop(DropRequest(everything=True))).stored == 0
    await one.ask(url)
    assert one.encodes() == 3
    await tiers.close()
    await other.misses.flights.close()
    await other.resolver._fetcher.close()
    arena.close()


async def test_a_drop_that_a_tier_cannot_do_is_an_error_and_bars(workers: Any, redis_server: int) -> None:
    worker = workers(disk=False, store=True)
    url = image_url()
    for _ in range(2):
        await worker.ask(url)
    await worker.settled()
    storage = worker.stored[0]._storage
    drop, storage.drop = storage.drop, _fail
    with pytest.raises(MmCacheError, match="drop again"):
        await worker.resolver.drop(DropRequest(everything=True))
    encodes = worker.encodes()
    await worker.ask(url)
    assert worker.encodes() == encodes + 1, "the store still has it, and it is not taken"
    storage.drop = drop
    await worker.resolver.drop(DropRequest(everything=True))
    for _ in range(2):
        await worker.ask(url)
    assert worker.encodes() == encodes + 2


def _fail(*_: Any) -> None:
    from trtllm_mm_cache.tiers.storage import StorageError

    raise StorageError("no")


async def test_a_worker_starts_with_a_dead_store_and_serves(
    pd_bench: PdBench, settings: PdSettings, folder: Path
) -> None:
    wanted = tier_settings(folder, free_port())
    tiers = stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[64 * NBYTES])
    worker = Worker(pd_bench, settings, tiers)
    url = image_url()
    for _ in range(5):
        await worker.ask(url)
        await worker.settled()
        pd_bench.cache.clear()
    disk, store = worker.stored
    assert (disk.offers.outcomes["stored"], worker.encodes()) == (1, 2)
    assert store.lookups["failed"] + store.lookups["passed_over"] == 2
    pd_bench.peer.instances.clear()
    with pytest.raises(EncodeUnavailableError):
        await worker.ask(image_url())
    await tiers.close()
    await worker.misses.flights.close()
    await worker.resolver._fetcher.close()


def test_a_store_without_a_secret_is_an_operators_mistake(folder: Path) -> None:
    wanted = tier_settings(None, free_port())
    with pytest.raises(ConfigurationError, match="MM_CACHE_ENTRIES_SECRET_FILE"):
        stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[NBYTES])
    both = wanted.model_copy(update={"multimodal_embedding_cache_disk_path": folder})
    with pytest.raises(ConfigurationError, match="MM_CACHE_ENTRIES_SECRET_FILE"):
        stored_tiers(both, FINGERPRINT, CollectorRegistry(), arenas=[NBYTES])


def test_mistakes_are_met_before_a_model_is_loaded(folder: Path) -> None:
    check_tiers(TierSettings())
    check_tiers(tier_settings(folder, free_port()))
    with pytest.raises(ConfigurationError, match="MM_CACHE_ENTRIES_SECRET_FILE"):
        check_tiers(tier_settings(None, free_port()))
    folder.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        check_tiers(tier_settings(folder, None))


async def test_a_disks_secret_is_made_once_and_for_this_user_alone(folder: Path) -> None:
    wanted = TierSettings(multimodal_embedding_cache_disk_path=folder)
    for _ in range(2):
        await stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[NBYTES]).close()
        assert (folder / "secret").stat().st_mode & 0o777 == 0o600
    made = (folder / "secret").read_text()
    assert len(made.strip()) == 64
    (folder / "secret").chmod(0o644)
    with pytest.raises(ConfigurationError, match="open to other users"):
        stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[NBYTES])
