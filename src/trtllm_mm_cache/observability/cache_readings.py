"""The cache's own snapshot as metrics.

The six `dynamo_component_embedding_cache_*` names are those that operators of Dynamo already chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric

from trtllm_mm_cache.cache.ages import AGE_BOUNDS_S, AgeStatistics
from trtllm_mm_cache.cache.statistics import CacheStatistics
from trtllm_mm_cache.observability.exposition import PREFIX, Reading

CACHE_PREFIX = "dynamo_component_embedding_cache"


def cache_readings(stats: CacheStatistics) -> Iterable[Reading]:
    """Yield the six metrics of Dynamo's own embedding cache."""
    yield Reading(f"{CACHE_PREFIX}_hits", "Lookups that found an embedding.", "counter", stats.hits)
    yield Reading(f"{CACHE_PREFIX}_misses", "Lookups that found none.", "counter", stats.misses)
    yield Reading(
        f"{CACHE_PREFIX}_evictions", "Entries displaced for want of space.", "counter", stats.evictions
    )
    yield Reading(f"{CACHE_PREFIX}_utilization", "Cached bytes over capacity.", "gauge", stats.utilization)
    yield Reading(f"{CACHE_PREFIX}_current_bytes", "Cached tensor bytes.", "gauge", stats.current_bytes)
    yield Reading(f"{CACHE_PREFIX}_entries", "Cached embeddings.", "gauge", stats.entries)


def arena_readings(arenas: Mapping[str, CacheStatistics]) -> Iterable[Reading | Metric]:
    """Yield what the six do not say, for each named arena of a worker."""
    for name, stats in arenas.items():
        labels = (("arena", name),)
        for gauge, text, value in _gauges(stats):
            yield Reading(f"{PREFIX}_{gauge}", text, "gauge", value, labels)
        for counter, text, value in _counters(stats):
            yield Reading(f"{PREFIX}_{counter}", text, "counter", value, labels)
    yield _eviction_ages(arenas)


def _gauges(stats: CacheStatistics) -> Iterable[tuple[str, str, float]]:
    arena = stats.arena
    yield "capacity_bytes", "Configured capacity; 0 where nothing is retained.", stats.capacity_bytes
    yield "leased_entries", "Cached embeddings that a request holds.", stats.leased_entries
    yield "leased_bytes", "Their bytes.", stats.leased_bytes
    yield "withdrawn_bytes", "Bytes no lookup finds that a request still holds.", stats.withdrawn_bytes
    yield "reservations", "Extents that are being filled.", stats.reservations
    yield "reserved_bytes", "Bytes in flight: reserved for a READ, not yet committed.", stats.reserved_bytes
    yield "quarantined_extents", "Extents a READ that was given up may still write to.", stats.quarantined
    yield "quarantined_bytes", "Their bytes.", stats.quarantined_bytes
    yield "arena_used_bytes", "Bytes of all extents.", arena.used_bytes
    yield "arena_free_bytes", "Bytes of all holes.", arena.free_bytes
    yield "arena_largest_hole_bytes", "The longest hole.", arena.largest_hole_bytes
    yield (
        "arena_fragmentation_ratio",
        "Share of the free bytes outside it.",
        arena.fragmentation,
    )
    yield "arena_unaccounted_bytes", "Used bytes that no entry has; not 0: a defect.", _unaccounted(stats)


def _counters(stats: CacheStatistics) -> Iterable[tuple[str, str, float]]:
    yield "hit_bytes", "Bytes of the embeddings that lookups found.", stats.hit_bytes
    yield "evicted_bytes", "Bytes displaced for want of space.", stats.evicted_bytes
    yield "dropped", "Entries dropped on demand.", stats.dropped
    yield "dropped_bytes", "Their bytes.", stats.dropped_bytes
    yield "moves", "Entries moved to make a hole.", stats.moves
    yield "moved_bytes", "Their bytes.", stats.moved_bytes
    yield "forgotten_reservations", "Reservations never ended by their owner; a defect.", stats.forgotten


def _unaccounted(stats: CacheStatistics) -> int:
    entries = stats.current_bytes + stats.reserved_bytes + stats.quarantined_bytes + stats.withdrawn_bytes
    return stats.arena.used_bytes - entries


def _eviction_ages(arenas: Mapping[str, CacheStatistics]) -> Metric:
    family = HistogramMetricFamily(
        f"{PREFIX}_eviction_age_seconds", "Time from commit to eviction.", labels=["arena"]
    )
    for name, stats in arenas.items():
        family.add_metric([name], _cumulative(stats.eviction_ages), stats.eviction_ages.sum_seconds)
    return family


def _cumulative(ages: AgeStatistics) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in AGE_BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(ages.counts), strict=True))
