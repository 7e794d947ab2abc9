"""Collectors of the cache's parts, which know nothing of Prometheus, so that the cache can be lifted out.

The six `dynamo_component_embedding_cache_*` names are those that operators of Dynamo already chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import CacheStatistics, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.statistics import AGE_BOUNDS_S, AgeStatistics
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.observability.metrics import PREFIX, counter, gauge, samples

CACHE_PREFIX = "dynamo_component_embedding_cache"


class CacheCollector(Collector):
    """The managers of one worker by the name of their arena; Dynamo's six names mean the first."""

    def __init__(self, managers: Mapping[str, MultimodalEmbeddingCacheManager]) -> None:
        self._managers = dict(managers)

    def collect(self) -> Iterable[Metric]:
        """Take a snapshot of each and yield it. Any thread."""
        arenas = {name: manager.statistics() for name, manager in self._managers.items()}
        yield from _dynamo(next(iter(arenas.values())))
        by_arena = [({"arena": name}, stats) for name, stats in arenas.items()]
        for rows, family in ((_gauges, GaugeMetricFamily), (_counters, CounterMetricFamily)):
            lists = [[(labels, *row) for row in rows(stats)] for labels, stats in by_arena]
            for same in zip(*lists, strict=True):
                _, name, text, _ = same[0]
                yield samples(family, name, text, [(labels, value) for labels, _, _, value in same])
        yield _eviction_ages(arenas)


class FlightCounts(Protocol):
    """What single flight counts, whoever does it; see `SingleFlight`."""

    started: int
    joined: int
    failed: int
    cancelled: int
    waiters: int

    @property
    def in_flight(self) -> int:
        """Flights under way."""
        ...


class FlightCollector(Collector):
    """The flights of one worker."""

    def __init__(self, flights: FlightCounts) -> None:
        self._flights = flights

    def collect(self) -> Iterable[Metric]:
        """Yield how many flights there were and are, and how many lookups joined one (were coalesced)."""
        flights = self._flights
        yield counter("flights", "Flights started.", flights.started)
        yield counter("flights_joined", "Lookups that joined a flight under way.", flights.joined)
        yield counter("flights_failed", "Flights that ended in an error.", flights.failed)
        yield counter("flights_cancelled", "Flights that no lookup waited for any more.", flights.cancelled)
        yield gauge("flights_in_progress", "Flights under way.", flights.in_flight)
        yield gauge("flight_waiters", "Lookups that wait for a flight.", flights.waiters)


class WhatIfCollector(Collector):
    """The what-if curve: one gauge a capacity, labelled with its factor."""

    def __init__(self, what_if: WhatIf) -> None:
        self._what_if = what_if

    def collect(self) -> Iterable[Metric]:
        """Yield the points, on how many lookups they stand, and which share of the keys is followed."""
        curve = self._what_if.curve()
        if curve.points:
            yield samples(
                GaugeMetricFamily,
                "what_if_hit_ratio",
                "Hit ratio that this multiple of the capacity would have had on the last lookups.",
                [({"capacity": f"{point.factor:g}x"}, point.hit_ratio) for point in curve.points],
            )
        yield gauge("what_if_lookups", "Lookups that the curve covers.", curve.lookups)
        yield gauge("what_if_sampling_share", "Share of the keys that is followed.", curve.sampling_share)


def _dynamo(stats: CacheStatistics) -> Iterable[Metric]:
    """Yield the six metrics of Dynamo's own embedding cache."""
    rows = (
        (CounterMetricFamily, "hits", "Lookups that found an embedding.", stats.hits),
        (CounterMetricFamily, "misses", "Lookups that found none.", stats.misses),
        (CounterMetricFamily, "evictions", "Entries evicted to make room.", stats.evictions),
        (GaugeMetricFamily, "utilization", "Cached bytes over capacity.", stats.utilization),
        (GaugeMetricFamily, "current_bytes", "Cached tensor bytes.", stats.current_bytes),
        (GaugeMetricFamily, "entries", "Cached embeddings.", stats.entries),
    )
    for family, name, text, value in rows:
        yield samples(family, name, text, [({}, value)], prefix=CACHE_PREFIX)


def _gauges(stats: CacheStatistics) -> Iterable[tuple[str, str, float]]:
    arena = stats.arena
    yield "capacity_bytes", "Configured capacity; 0 where nothing is retained.", stats.capacity_bytes
    yield "leased_entries", "Cached embeddings that a request holds.", stats.leased_entries
    yield "leased_bytes", "Their bytes.", stats.leased_bytes
    yield "withdrawn_bytes", "Bytes no lookup finds that a request still holds.", stats.withdrawn_bytes
    yield "reservations", "Extents that are being filled.", stats.reservations
    yield "reserved_bytes", "Bytes in flight: reserved for a READ, not yet committed.", stats.reserved_bytes
    yield "quarantined_extents", "Extents that an unsettled READ may still write to.", stats.quarantined
    yield "quarantined_bytes", "Their bytes.", stats.quarantined_bytes
    yield "arena_used_bytes", "Bytes of all extents.", arena.used_bytes
    yield "arena_free_bytes", "Bytes of all holes.", arena.free_bytes
    yield "arena_largest_hole_bytes", "The longest hole.", arena.largest_hole_bytes
    yield "arena_fragmentation_ratio", "Share of the free bytes outside it.", arena.fragmentation
    yield "arena_unaccounted_bytes", "Used bytes that no entry has; not 0: a defect.", _unaccounted(stats)


def _counters(stats: CacheStatistics) -> Iterable[tuple[str, str, float]]:
    yield "hit_bytes", "Bytes of the embeddings that lookups found.", stats.hit_bytes
    yield "evicted_bytes", "Bytes evicted to make room.", stats.evicted_bytes
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
