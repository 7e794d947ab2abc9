"""A step in the way of a request: timed into a histogram, and a span where tracing is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.trace import Span
from prometheus_client import Histogram

from trtllm_mm_cache.observability.tracing import span


class Step:
    """One step. Thread-safe."""

    def __init__(self, name: str, seconds: Histogram, attributes: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._seconds = seconds
        self._attributes = attributes

    def labels(self, **labels: str) -> Step:
        """Return the step with the histogram's labels set, which become the span's attributes too."""
        return Step(self._name, self._seconds.labels(**labels), labels)

    @contextmanager
    def time(self) -> Iterator[Span]:
        """Time a block, also one that fails."""
        with span(self._name, attributes=self._attributes) as current, self._seconds.time():
            yield current
