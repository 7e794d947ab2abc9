"""One worker's exposition, parsed: what the figures are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

CACHE = "dynamo_component_embedding_cache"
OURS = "trtllm_mm_cache"


@dataclass(frozen=True)
class Scrape:
    """The samples of one worker at `at` (seconds of a clock that only goes forward)."""

    at: float
    samples: tuple[tuple[str, dict[str, str], float], ...]

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Read Prometheus text, keeping our own and Dynamo's cache metrics. Raises `ValueError`."""
        return cls(
            at,
            tuple(
                (sample.name, sample.labels, sample.value)
                for family in text_string_to_metric_families(text)
                if family.name.startswith((CACHE, OURS))
                for sample in family.samples
            ),
        )

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of `name` with `labels`; 0 where there is none."""
        return sum(
            value for each, has, value in self.samples if each == name and labels.items() <= has.items()
        )

    def has(self, name: str) -> bool:
        """Whether there is a sample of that name."""
        return any(each == name for each, _, _ in self.samples)

    def label_values(self, name: str, label: str) -> dict[str, float]:
        """Return the samples of `name` by the value of one label."""
        found: dict[str, float] = {}
        for each, has, value in self.samples:
            if each == name and label in has:
                found[has[label]] = found.get(has[label], 0.0) + value
        return found

    @property
    def component(self) -> str:
        """`pd` or `encode`; "" for something that is not one of our workers."""
        return next((has.get("dynamo_component", "") for _, has, _ in self.samples), "")


@dataclass(frozen=True)
class Interval:
    """What happened in one worker between two scrapes; since its start, where there is no `before`.

    A counter that went down means that the worker was restarted meanwhile: then it counts from 0.
    """

    now: Scrape
    before: Scrape | None = None

    @property
    def seconds(self) -> float:
        """Time between the two; 0 without `before`."""
        return 0.0 if self.before is None else self.now.at - self.before.at

    def gained(self, name: str, **labels: str) -> float:
        """Return what a counter gained."""
        value = self.now.value(name, **labels)
        before = 0.0 if self.before is None else self.before.value(name, **labels)
        return value - before if value >= before else value

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float]]:
        """Return a histogram's cumulative buckets over the interval, by upper bound."""
        bounds = self.now.label_values(f"{name}_bucket", "le")
        return sorted((float(bound), self.gained(f"{name}_bucket", le=bound, **labels)) for bound in bounds)


def per_second(intervals: Iterable[Interval], name: str, **labels: str) -> float | None:
    """Return the rate of a counter over several workers; None without an earlier scrape."""
    rates = [
        interval.gained(name, **labels) / interval.seconds for interval in intervals if interval.seconds > 0
    ]
    return sum(rates) if rates else None


def quantile(intervals: Iterable[Interval], share: float, name: str, **labels: str) -> float | None:
    """Return a quantile of a histogram over several workers, interpolated in its bucket as Prometheus does.

    None where nothing was observed; the largest finite bound for what lies beyond it.
    """
    merged: dict[float, float] = {}
    for interval in intervals:
        for bound, count in interval.buckets(name, **labels):
            merged[bound] = merged.get(bound, 0.0) + count
    total = merged.get(math.inf, 0.0)
    if not total:
        return None
    rank, lower, below = share * total, 0.0, 0.0
    for bound, count in sorted(merged.items()):
        if count >= rank:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
        lower, below = bound, count
    return lower
