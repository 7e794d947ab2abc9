"""The figures of `top`, over expositions that the workers' own classes render."""

from __future__ import annotations

import math

import pytest
import torch

from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cli.top.figures import cache_figures
from trtllm_mm_cache.cli.top.scrape import Interval, Scrape, quantile
from trtllm_mm_cache.observability.cache_metrics import CacheCollector
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.pd.metrics import PdMetrics

TTFT = "trtllm_mm_cache_time_to_first_token_seconds"


class Pd:
    """A PD worker's exposition, over a real cache and real metrics."""

    def __init__(self) -> None:
        self.cache = MultimodalEmbeddingCacheManager(4096)
        self.metrics = PdMetrics()
        self.metrics.registry.register(CacheCollector({"cache": self.cache}))
        self.exposition = Exposition(self.metrics.registry, {"dynamo_component": "pd", "model": "m"})

    def look_up(self, key: str) -> None:
        hit = self.cache.get(key) is not None
        self.metrics.found("hit" if hit else "miss", nbytes=1024, seconds=0.01, saved_seconds=0.5)
        if not hit:
            self.cache.set(key, CachedEmbedding(torch.zeros(1024, dtype=torch.uint8)))
        self.metrics.first_token.labels("hit" if hit else "miss").observe(0.02 if hit else 0.2)
        self.metrics.requests.labels("served").inc()

    def scrape(self, at: float) -> Scrape:
        return Scrape.parse(self.exposition.render(), at)


def test_ratios_rates_and_latencies_are_those_of_the_span() -> None:
    pd = Pd()
    for key in "abcdefgh":
        pd.look_up(key)
    before = pd.scrape(10.0)
    for key in "hhhi":
        pd.look_up(key)
    figures = cache_figures([Interval(pd.scrape(12.0), before)])
    assert figures.hit_ratio == figures.byte_hit_ratio == 0.75
    assert figures.hit_ratio_since_start == 3 / 12
    assert figures.requests_per_s == 2
    assert figures.evictions_per_s == 0.5
    assert (figures.entries, figures.current_bytes, figures.capacity_bytes) == (4, 4096, 4096)
    assert figures.saved_seconds == 1.5
    latencies = {latency.kind: latency for latency in figures.latencies}
    assert (latencies["hit"].requests, latencies["miss"].requests, latencies["text"].requests) == (3, 1, 0)
    assert latencies["hit"].p50 is not None
    assert latencies["miss"].p50 is not None
    assert latencies["hit"].p50 <= 0.025 < latencies["miss"].p50 <= 0.25
    assert latencies["text"].p50 is None


def test_without_traffic_there_is_no_ratio() -> None:
    scrape = Pd().scrape(0.0)
    figures = cache_figures([Interval(scrape, scrape)])
    assert figures.hit_ratio is figures.byte_hit_ratio is figures.requests_per_s is None


def test_a_restarted_worker_counts_from_zero() -> None:
    old, new = Pd(), Pd()
    for _ in range(5):
        old.look_up("a")
    for _ in range(2):
        new.look_up("a")
    interval = Interval(new.scrape(2.0), old.scrape(1.0))
    assert interval.gained("dynamo_component_embedding_cache_hits_total") == 1
    assert interval.gained("trtllm_mm_cache_requests_total") == 2


def test_workers_are_added_up() -> None:
    one, other = Pd(), Pd()
    for key in "aa":
        one.look_up(key)
    other.look_up("a")
    figures = cache_figures([Interval(one.scrape(1.0)), Interval(other.scrape(1.0))])
    assert figures.hit_ratio == pytest.approx(1 / 3)
    assert figures.entries == 2


@pytest.mark.parametrize(
    ("seconds", "share", "expected"),
    [([0.03] * 4, 0.5, 0.0375), ([0.03] * 4 + [0.2] * 4, 0.5, 0.05), ([500.0], 0.9, 60.0), ([], 0.5, None)],
)
def test_quantiles_are_prometheuss(seconds: list[float], share: float, expected: float | None) -> None:
    """Linear within a bucket; beyond the last finite bound, that bound."""
    pd = Pd()
    for each in seconds:
        pd.metrics.first_token.labels("hit").observe(each)
    found = quantile([Interval(pd.scrape(0.0))], share, TTFT, kind="hit")
    assert found == (None if expected is None else pytest.approx(expected))
    assert found is None or math.isfinite(found)
