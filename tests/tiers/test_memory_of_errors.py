"""A tier that fails keeps none of a request's bytes, with the garbage collector switched off."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.e2e.stack import free_port
from tests.pd.bench import FINGERPRINT, NBYTES, allow_private_addresses, require_salt, settings
from tests.pd.bench import Bench as PdBench
from tests.pd.bench import bench as pd_bench
from tests.pd.test_memory_of_errors import FILE_BYTES, ROUNDS, down_to, large_url, traced
from tests.tiers.test_workers import Worker, damage, tier_settings
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.configured import stored_tiers

__all__ = ["allow_private_addresses", "pd_bench", "require_salt", "settings", "traced"]


@pytest.mark.parametrize("kind", ["dead", "damaged", "stuck"])
async def test_nothing_of_the_files_is_kept(
    pd_bench: PdBench,
    settings: PdSettings,
    folder: Path,
    traced: None,
    kind: str,
) -> None:
    settings = settings.model_copy(update={"max_waiting_image_mb": 64})
    wanted = tier_settings(folder, free_port() if kind == "dead" else None)
    tiers = stored_tiers(wanted, FINGERPRINT, CollectorRegistry(), arenas=[64 * NBYTES])
    worker = Worker(pd_bench, settings, tiers)
    (tier, *_) = worker.stored
    urls = [large_url(number) for number in range(ROUNDS)]
    gate = threading.Event()
    for url in urls:
        await worker.ask(url)
        await worker.ask(url)
        await worker.settled()
    if kind == "damaged":
        damage(folder)
    elif kind == "stuck":
        look_up: Any = tier._storage.look_up

        def stuck(name: Any) -> Any:
            assert gate.wait(30)
            return look_up(name)

        tier._storage.look_up = stuck  # type: ignore[method-assign]
        tier._limits = replace(tier._limits, lookup_s=0.1)  # it never answers: no need to wait for long
    pd_bench.cache.clear()
    before = tracemalloc.get_traced_memory()[0]
    for url in urls:
        await worker.ask(url)
    await down_to(before + FILE_BYTES // 2)
    gate.set()
    await tiers.close()
    await worker.misses.flights.close()
    await worker.resolver._fetcher.close()
