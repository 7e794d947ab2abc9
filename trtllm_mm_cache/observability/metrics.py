"""How the parts of a worker say what they count, and how it becomes Prometheus text.

A part that counts something is a `Collector`: it keeps plain numbers where it works and yields them by
`counter` and `gauge` at the moment of a scrape. An event with a duration or a size goes into a histogram of
`prometheus_client` itself. Both are registered in the worker's one `CollectorRegistry`, which `Exposition`
renders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.observability.traces import span

PREFIX = "trtllm_mm_cache"

# Few, because each bound costs a time series in every worker and label value.
STEP_SECONDS: Final = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip
"""A step in the way of an item: from a key of a small file to the deadline of a fetch."""

FIRST_TOKEN_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
"""Time to first token: from a cached image on a fast GPU to a queue that is too long."""

BATCH_ITEMS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Items in one run of the vision tower."""


def counter(name: str, help_text: str, value: float, **labels: str) -> Metric:
    """Return one sample of a counter; `name` without `trtllm_mm_cache_` and without `_total`."""
    return samples(CounterMetricFamily, name, help_text, [(labels, value)])


def gauge(name: str, help_text: str, value: float, **labels: str) -> Metric:
    """Return one sample of a gauge; `name` without `trtllm_mm_cache_`."""
    return samples(GaugeMetricFamily, name, help_text, [(labels, value)])


def samples(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    help_text: str,
    values: Iterable[tuple[Mapping[str, str], float]],
    *,
    prefix: str = PREFIX,
) -> Metric:
    """Return a family with one sample for each of `values`, which are labels and a number."""
    metric = family(f"{prefix}_{name}", help_text, labels=[])
    suffix = "_total" if family is CounterMetricFamily else ""
    for labels, value in values:
        metric.add_sample(f"{prefix}_{name}{suffix}", dict(labels), value)
    return metric


class Step:
    """A step in the way of a request: timed into a histogram, and a span where tracing is on. Thread-safe."""

    def __init__(self, name: str, seconds: Histogram, attributes: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._seconds = seconds
        self._attributes = attributes

    @classmethod
    def new(cls, registry: CollectorRegistry, name: str, help_text: str, *labels: str) -> Step:
        """Return a step whose histogram `name`_seconds is registered in `registry`."""
        return cls(name, histogram(registry, f"{name}_seconds", help_text, STEP_SECONDS, *labels))

    def labels(self, **labels: str) -> Step:
        """Return the step with the histogram's labels set, which become the span's attributes too."""
        return Step(self._name, self._seconds.labels(**labels), labels)

    @contextmanager
    def time(self) -> Iterator[Span]:
        """Time a block, also one that fails."""
        with span(self._name, attributes=self._attributes) as current, self._seconds.time():
            yield current


def histogram(
    registry: CollectorRegistry, name: str, help_text: str, buckets: tuple[float, ...], *labels: str
) -> Histogram:
    """Return a histogram registered in `registry`; `name` without `trtllm_mm_cache_`."""
    return Histogram(f"{PREFIX}_{name}", help_text, labels, buckets=buckets, registry=registry)


class Exposition:
    """Renders everything in `registry` with `labels` added to every sample. Thread-safe.

    Families of one name that several collectors yield become one; `_created` samples, which no chart uses,
    are left out.
    """

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._rendered = CollectorRegistry(auto_describe=False)
        self._rendered.register(_Labelled(registry, dict(labels)))

    def render(self) -> str:
        """Return the text exposition of this moment."""
        return generate_latest(self._rendered).decode()


class _Labelled(Collector):
    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for metric in self._registry.collect():
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
        return families.values()
