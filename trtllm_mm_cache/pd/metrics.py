"""What a PD worker measures as it happens: the steps of an item, and the answers."""

from __future__ import annotations

from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from trtllm_mm_cache.errors import error_codes
from trtllm_mm_cache.observability.metrics import (
    FIRST_TOKEN_SECONDS,
    PREFIX,
    STEP_SECONDS,
    Step,
    histogram,
)

LookupOutcome = Literal["hit", "miss", "joined"]
"""`joined`: a miss that waited for a flight under way instead of starting one."""

RequestKind = Literal["hit", "miss", "mixed", "text"]
"""All items hits, none, some; or no item at all."""

RequestOutcome = Literal["served", "failed", "stopped"]
"""`stopped` by the client, before the answer was complete."""

_SCHEMES: Final = ("data", "http", "https", "file")


class PdMetrics:
    """Histograms and counters of one PD worker; its parts register theirs in `registry` too. Thread-safe."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.fetch = Step.new(registry, "fetch", "Step 2: reference to checked bytes.", "scheme")
        self.key = Step.new(registry, "key", "Step 3: hashing the bytes.")
        self.lookup_wait = histogram(
            registry,
            "lookup_wait_seconds",
            "Steps 4 to 7: from the key to a lease on the embedding.",
            STEP_SECONDS,
            "outcome",
        )
        self.first_token = histogram(
            registry,
            "time_to_first_token_seconds",
            "From the request's arrival at this worker to its first token.",
            FIRST_TOKEN_SECONDS,
            "kind",
        )
        self.served_bytes = self._counter(
            "served_bytes", "Bytes of embeddings given to the engine, by how they were found.", "outcome"
        )
        self.saved_encode_seconds = self._counter(
            "saved_encode_seconds", "Vision tower seconds that hits did not cost again."
        )
        self.requests = self._counter("requests", "Requests that ended.", "outcome")
        self.errors = self._counter("errors", "Requests not served, by error code.", "code")
        self.in_flight = Gauge(
            f"{PREFIX}_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        for outcome in get_args(LookupOutcome):
            self.lookup_wait.labels(outcome)
            self.served_bytes.labels(outcome)
        for kind in get_args(RequestKind):
            self.first_token.labels(kind)
        for ending in get_args(RequestOutcome):
            self.requests.labels(ending)
        for code in error_codes():
            self.errors.labels(code)

    def found(self, outcome: LookupOutcome, *, nbytes: int, seconds: float, saved_seconds: float) -> None:
        """Count one item that has its embedding; `saved_seconds` of the vision tower, for a hit."""
        self.lookup_wait.labels(outcome).observe(seconds)
        self.served_bytes.labels(outcome).inc(nbytes)
        if outcome == "hit":
            self.saved_encode_seconds.inc(saved_seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)


def scheme_of(reference: str | bytes) -> str:
    """Return the scheme of a media reference, or "other": few values. Bytes came in a data: URL."""
    if isinstance(reference, bytes):
        return "data"
    scheme = reference[:8].partition(":")[0].lower()
    return scheme if scheme in _SCHEMES else "other"


def kind_of(hits: int, misses: int) -> RequestKind:
    """Say what a request's items were."""
    if hits and misses:
        return "mixed"
    if hits:
        return "hit"
    return "miss" if misses else "text"
