"""What the frontend measures: requests by their end, first tokens, and the memory that bodies take."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.frontend.body import BodyMemory
from trtllm_mm_cache.frontend.responses import status_of
from trtllm_mm_cache.observability.metrics import FIRST_TOKEN_SECONDS, PREFIX, counter, gauge, histogram

logger = logging.getLogger(__name__)


class FrontendMetrics:
    """Counters and histograms of one frontend; its parts register theirs in `registry` too. Thread-safe."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.responses = Counter(
            f"{PREFIX}_responses", "Answers to clients, by status.", ["status"], registry=registry
        )
        self.in_flight = Gauge(
            f"{PREFIX}_responses_in_flight", "Requests that clients wait for.", registry=registry
        )
        self.first_token = histogram(
            registry,
            "response_first_token_seconds",
            "From the arrival of a request's head to the first token's way to the client.",
            FIRST_TOKEN_SECONDS,
        )
        self.tokens = Counter(f"{PREFIX}_response_tokens", "Tokens sent to clients.", registry=registry)


class BodyMemoryCollector(Collector):
    """What bodies take of the memory for them."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory

    def collect(self) -> Iterable[Metric]:
        """Yield what is held, what waits, and what was refused."""
        memory = self._memory
        yield gauge(
            "body_bytes", "Memory that request bodies take, three times their length.", memory.held_bytes
        )
        yield gauge("bodies_waiting", "Large requests whose body is not received yet.", memory.waiting)
        yield counter("bodies_refused", "Large requests whose turn did not come.", memory.refused)


class ResponseRecord:
    """One request while it is answered: its metrics and its one line in the log. Times in seconds."""

    def __init__(self, request_id: str, metrics: FrontendMetrics) -> None:
        self.request_id = request_id
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._first_token: float | None = None
        self.tokens = 0
        self.status = 499  # until there is another: the client left before its answer
        self._code = ""
        metrics.in_flight.inc()

    def generated(self, tokens: int) -> None:
        """The answer has `tokens` tokens now."""
        self.tokens = tokens
        if self._first_token is None and tokens:
            self._first_token = time.perf_counter() - self._arrived
            self._metrics.first_token.observe(self._first_token)

    def failed(self, error: MmCacheError) -> None:
        """The answer is this error."""
        self.status, self._code = status_of(error), error.code

    def ended(self) -> None:
        """Count it and write its line."""
        metrics = self._metrics
        metrics.in_flight.dec()
        metrics.responses.labels(str(self.status)).inc()
        metrics.tokens.inc(self.tokens)
        seconds = time.perf_counter() - self._arrived
        logger.info(
            "request %s: %d%s, %d tokens, %.3f s",
            self.request_id,
            self.status,
            self._code and f" {self._code}",
            self.tokens,
            seconds,
            extra={"status": self.status, "tokens": self.tokens, "total_s": round(seconds, 6)},
        )
