"""Metrics of a worker, as Prometheus text for its system port.

Nothing here counts: each metric reads a snapshot (`statistics()`, `stats`) of the part that counts,
at the moment of the scrape. The six `dynamo_component_embedding_cache_*` names and their labels are
those that operators of Dynamo already chart; the others are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CACHE_PREFIX = "dynamo_component_embedding_cache"


@dataclass(frozen=True)
class Reading:
    """One sample: `name` without a counter's `_total`, bounded labels, and its value now."""

    name: str
    help: str
    kind: Literal["counter", "gauge"]
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class Exposition:
    """Renders the readings of a worker. Thread-safe as far as the given `read` is."""

    def __init__(self, read: Callable[[], Iterable[Reading]], labels: Mapping[str, str]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Readings(read, dict(labels)))

    def render(self) -> str:
        """Return the text exposition of this moment."""
        return generate_latest(self._registry).decode()


class _Readings(Collector):
    def __init__(self, read: Callable[[], Iterable[Reading]], labels: dict[str, str]) -> None:
        self._read = read
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for reading in self._read():
            labels = {**self._labels, **dict(reading.labels)}
            family = families.get(reading.name)
            if family is None:
                kind = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
                family = families[reading.name] = kind(reading.name, reading.help, labels=list(labels))
            family.add_metric(list(labels.values()), reading.value)
        return families.values()


def cache_readings(stats: Mapping[str, float]) -> Iterable[Reading]:
    """The six cache metrics from `MultimodalEmbeddingCacheManager.stats`."""
    yield Reading(f"{CACHE_PREFIX}_hits", "Lookups that found an embedding.", "counter", stats["hits"])
    yield Reading(f"{CACHE_PREFIX}_misses", "Lookups that found none.", "counter", stats["misses"])
    yield Reading(
        f"{CACHE_PREFIX}_evictions", "Entries displaced for want of space.", "counter", stats["evictions"]
    )
    yield Reading(f"{CACHE_PREFIX}_utilization", "Cached bytes over capacity.", "gauge", stats["utilization"])
    yield Reading(f"{CACHE_PREFIX}_current_bytes", "Cached tensor bytes.", "gauge", stats["current_bytes"])
    yield Reading(f"{CACHE_PREFIX}_entries", "Cached embeddings.", "gauge", stats["entries"])
