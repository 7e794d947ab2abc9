"""A worker's metrics as Prometheus text for its system port.

Two kinds of metric meet here. What a part of the worker counts anyway (the cache, the flights, the reader)
is a `Reading` of its snapshot, taken at the moment of the scrape. What is an event with a duration or a
size goes into `prometheus_client`'s own histograms and counters in the worker's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "trtllm_mm_cache"

Read = Callable[[], Iterable["Reading | Metric"]]


@dataclass(frozen=True)
class Reading:
    """One sample: `name` without a counter's `_total`, bounded labels, and its value now."""

    name: str
    help: str
    kind: Literal["counter", "gauge"]
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class Exposition:
    """Renders the metrics of a worker: those of `events`, then those that `read` yields.

    Every sample gets `labels` in addition to its own. Thread-safe as far as `read` is.
    """

    def __init__(
        self, read: Read, labels: Mapping[str, str], events: CollectorRegistry | None = None
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        if events is not None:
            self._registry.register(_Labelled(events, dict(labels)))
        self._registry.register(_Labelled(_Readings(read), dict(labels)))

    def render(self) -> str:
        """Return the text exposition of this moment."""
        return generate_latest(self._registry).decode()


class _Labelled(Collector):
    """Another collector's metrics with labels added, without the `_created` samples, which nobody charts."""

    def __init__(self, inner: Collector, labels: dict[str, str]) -> None:
        self._inner = inner
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for metric in self._inner.collect():
            metric.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield metric


class _Readings(Collector):
    """Readings gathered into families by name; whole families pass as they are."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for each in self._read():
            if isinstance(each, Metric):
                families[each.name] = each
                continue
            family = families.get(each.name)
            if family is None:
                kind = CounterMetricFamily if each.kind == "counter" else GaugeMetricFamily
                family = families[each.name] = kind(each.name, each.help, labels=[])
            suffix = "_total" if each.kind == "counter" else ""
            family.add_sample(each.name + suffix, dict(each.labels), each.value)
        return families.values()
