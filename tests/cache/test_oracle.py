"""What is hit over whole traces, against libCacheSim: caches without extents, holes or holders."""

from __future__ import annotations

from dataclasses import dataclass

import libcachesim
import pytest
import torch

from tests.cache.traces import TRACES, Trace
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

CAPACITY = 8 * 1024**2  # some 900 entries, as many as a cache of 5 GB has
LENGTH = 10_000
PAYLOAD = torch.zeros(128 * 1024, dtype=torch.uint8)


@dataclass(frozen=True)
class Hits:
    """Which requests were hits; ratios in percent."""

    trace: Trace
    hits: list[bool]

    @property
    def hit_percent(self) -> float:
        return 100 * sum(self.hits) / len(self.hits)

    @property
    def byte_hit_percent(self) -> float:
        hit = sum(size for (_, size), hit in zip(self.trace, self.hits, strict=True) if hit)
        return 100 * hit / sum(size for _, size in self.trace)


def ours(policy: str, trace: Trace, capacity: int = CAPACITY) -> Hits:
    manager = MultimodalEmbeddingCacheManager(capacity, policy=make_policy(policy, capacity))
    hits = []
    for item, size in trace:
        key = str(item)
        hits.append(manager.get(key) is not None)
        if not hits[-1]:
            assert manager.set(key, CachedEmbedding(PAYLOAD[:size]))
    statistics = manager.statistics()
    assert statistics.policy == policy
    assert statistics.evictions > 0, "the trace fits: nothing was tested"
    return Hits(trace, hits)


def reference(cache: type[libcachesim.CacheBase], trace: Trace, capacity: int = CAPACITY) -> Hits:
    oracle = cache(capacity)
    request = libcachesim.Request()
    hits = []
    for request.obj_id, request.obj_size in trace:
        hits.append(oracle.get(request))
    return Hits(trace, hits)


def trace_of(name: str, seed: int) -> Trace:
    print(f"{name} trace, seed {seed}")
    return TRACES[name](seed, LENGTH)


@pytest.mark.parametrize("name", TRACES)
def test_lru_hits_exactly_what_an_lru_cache_hits_where_sizes_are_uniform(name: str) -> None:
    size = 64 * 1024
    trace = [(item, size) for item, _ in trace_of(name, 1)]
    assert ours("lru", trace).hits == reference(libcachesim.LRU, trace).hits


@pytest.mark.parametrize("name", TRACES)
def test_mixed_sizes_cost_lru_less_than_half_a_point(name: str) -> None:
    trace = trace_of(name, 2)
    assert ours("lru", trace).hit_percent == pytest.approx(
        reference(libcachesim.LRU, trace).hit_percent, abs=0.5
    )


@pytest.mark.parametrize("name", TRACES)
def test_s3fifo_is_within_a_point_of_its_reference(name: str) -> None:
    trace = trace_of(name, 3)
    assert ours("s3fifo", trace).byte_hit_percent == pytest.approx(
        reference(libcachesim.S3FIFO, trace).byte_hit_percent, abs=1.0
    )


def test_s3fifo_withstands_a_scan_and_lru_does_not() -> None:
    trace = trace_of("scan-polluted", 4)
    assert ours("s3fifo", trace).byte_hit_percent > ours("lru", trace).byte_hit_percent + 4
