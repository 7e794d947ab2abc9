"""The PD worker's memory is what its settings say."""

from __future__ import annotations

import pytest

from trtllm_mm_cache.pd.memory import PdMemory
from trtllm_mm_cache.settings import GB, MB, PdSettings


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
async def test_capacity_and_policy_arrive_at_the_cache(policy: str) -> None:
    settings = PdSettings.model_validate(
        {
            "model_path": "unused",
            "multimodal_embedding_cache_capacity_gb": 1 / 64,
            "multimodal_embedding_cache_policy": policy,
            "transfer_arena_mb": 2,
        }
    )
    memory = await PdMemory.create(settings)
    statistics = memory.cache.statistics()
    assert (statistics.policy, statistics.capacity_bytes) == (policy, GB // 64)
    assert not memory.transit.retain
    assert memory.transit.arena.capacity_bytes == 2 * MB
    await memory.close()


async def test_without_capacity_there_is_one_arena() -> None:
    memory = await PdMemory.create(PdSettings(model_path="unused", transfer_arena_mb=2))
    assert memory.cache is memory.transit
    await memory.close()
