"""An encode worker with a disk: what it encoded once it need not encode after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import torch

from tests.e2e.stack import new_image, png
from tests.encode.bench import Bench, running
from tests.encode.conftest import encoder
from tests.tiers.bench import until
from trtllm_mm_cache.engines.transformers import TransformersVisionEncoder
from trtllm_mm_cache.runtime.control import DropRequest
from trtllm_mm_cache.settings import EncodeSettings, TierSettings
from trtllm_mm_cache.tiers.configured import stored_tiers

__all__ = ["encoder"]

Started = Callable[[], AbstractAsyncContextManager[Bench]]


@pytest.fixture
def started(encoder: TransformersVisionEncoder, folder: Path) -> Started:
    """Start an encode worker with the same disk as the one before it."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Bench]:
        async with running(encoder) as bench:
            settings = TierSettings(
                multimodal_embedding_cache_disk_path=folder, multimodal_embedding_cache_store_at_use=1
            )
            tiers = stored_tiers(settings, bench.fingerprint, bench.registry, arenas=[2**20])
            bench.pipeline._tiers = tiers
            yield bench

    return start


async def stored(bench: Bench, count: int) -> None:
    (tier,) = bench.pipeline._tiers._tiers
    await until(lambda: tier.offers.outcomes["stored"] == count)


async def test_a_restart_costs_no_encode(started: Started) -> None:
    media = png(new_image())
    async with started() as bench:
        made = await bench.call(media, salt="a")
        assert made.origin == "encoded"
        embedding = bench.embedding(made)
        await stored(bench, 1)
    async with started() as bench:
        bench.encoder.open.clear()  # the tower would wait for ever
        brought = await bench.call(media, salt="a")
        assert (brought.origin, brought.encode_seconds) == ("cached", made.encode_seconds)
        assert (brought.checksum, brought.shape) == (made.checksum, made.shape)
        assert torch.equal(bench.embedding(brought), embedding)
        assert (await bench.call(media, salt="a")).origin == "cached"


async def test_what_a_pd_worker_found_wrong_is_made_anew(started: Started) -> None:
    media = png(new_image())
    async with started() as bench:
        await bench.call(media)
        await stored(bench, 1)
        bench.manager.clear()
        assert (await bench.call(media)).origin == "cached"
        assert (await bench.call(media, fresh=True)).origin == "encoded"


async def test_drop_by_image_finds_what_came_back_from_disk(started: Started) -> None:
    media = png(new_image())
    async with started() as bench:
        await bench.call(media, salt="a")
        await stored(bench, 1)
    async with started() as bench:
        await bench.call(media, salt="a")
        from trtllm_mm_cache.cache.key import content_digest

        report = await bench.server.drop(DropRequest(content=content_digest(media).hex()))
        assert (report.entries, report.stored) == (1, 1)
        assert (await bench.call(media, salt="a")).origin == "encoded"


async def test_what_may_not_be_retained_is_not_stored(started: Started) -> None:
    async with started() as bench:
        await bench.call(png(new_image()), retain=False)
        await asyncio.sleep(0)
        (tier,) = bench.pipeline._tiers._tiers
        assert tier.offers.waiting == (0, 0)
        assert not tier.offers.outcomes


def test_the_settings_are_the_same_flags_as_the_pd_workers() -> None:
    settings = EncodeSettings(model_path="unused")
    assert settings.tiers == TierSettings()
