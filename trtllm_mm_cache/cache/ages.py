"""How old entries were when they were evicted, counted in a few classes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

AGE_BOUNDS_S: tuple[float, ...] = (1, 10, 60, 300, 1800, 7200, 21600, 86400)
"""Upper bounds of the classes in seconds, inclusive; the last class has none."""


@dataclass(frozen=True, slots=True)
class AgeStatistics:
    """A snapshot: how many ages fell into each class of `AGE_BOUNDS_S` and beyond, and their sum."""

    counts: tuple[int, ...]
    sum_seconds: float


class AgeCounter:
    """Counts ages. Not thread-safe."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(AGE_BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one age."""
        self._counts[bisect_left(AGE_BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def statistics(self) -> AgeStatistics:
        """Return a snapshot."""
        return AgeStatistics(tuple(self._counts), self._sum)
