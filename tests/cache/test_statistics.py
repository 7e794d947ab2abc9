"""How old entries were when they were evicted."""

from __future__ import annotations

import torch

from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.statistics import AGE_BOUNDS_S

NBYTES = 4096


def entry() -> CachedEmbedding:
    return CachedEmbedding(torch.zeros(NBYTES, dtype=torch.uint8))


def test_ages_count_from_the_commit_to_the_eviction_and_only_evictions() -> None:
    now = [1000.0]
    manager = MultimodalEmbeddingCacheManager(2 * NBYTES, clock=lambda: now[0])
    for key, at in [("a", 0.0), ("b", 5.0), ("c", 10.0), ("d", 500.0)]:
        now[0] = 1000.0 + at
        assert manager.set(key, entry())
        manager.get(key)
    manager.drop("c")
    manager.set("d", entry())
    ages = manager.statistics().eviction_ages
    # a left at 10 s after 10 s, b at 500 s after 495 s; c was dropped and d replaced.
    expected = [0] * (len(AGE_BOUNDS_S) + 1)
    expected[AGE_BOUNDS_S.index(10)] = expected[AGE_BOUNDS_S.index(1800)] = 1
    assert list(ages.counts) == expected
    assert ages.sum_seconds == 505
    manager.close()
