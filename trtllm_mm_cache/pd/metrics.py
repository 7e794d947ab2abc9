"""What a PD worker measures as it happens: the steps of an image, and the answers."""

from __future__ import annotations

from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from trtllm_mm_cache.errors import error_codes
from trtllm_mm_cache.observability.buckets import FIRST_TOKEN_SECONDS, STEP_SECONDS
from trtllm_mm_cache.observability.exposition import PREFIX
from trtllm_mm_cache.observability.step import Step

LookupOutcome = Literal["hit", "miss", "joined"]
"""`joined`: a miss that waited for a flight under way instead of starting one."""

RequestKind = Literal["hit", "miss", "mixed", "text"]
"""All images hits, none, some; or no image at all."""

RequestOutcome = Literal["served", "failed", "stopped"]
"""`stopped` by the client, before the answer was complete."""

_SCHEMES: Final = ("data", "http", "https", "file")


class PdMetrics:
    """Histograms and counters of one PD worker, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.fetch = self._step("fetch", "Step 2: reference to checked bytes.", "scheme")
        self.key = self._step("key", "Step 3: hashing the bytes.")
        self.lookup_wait = self._histogram(
            "lookup_wait_seconds",
            "Steps 4 to 7: from the key to a lease on the embedding.",
            STEP_SECONDS,
            "outcome",
        )
        self.encode_call = self._step("encode_call", "Step 5: asking an encode worker until its answer.")
        self.reserve = self._step("reserve", "Before step 6: making room in the arena.")
        self.transfer = self._step("transfer", "Step 6: NIXL READ and checksum.")
        self.commit = self._step("commit", "Step 7: checks until the entry is visible.")
        self.first_token = self._histogram(
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
        """Count one image that has its embedding; `saved_seconds` of the vision tower, for a hit."""
        self.lookup_wait.labels(outcome).observe(seconds)
        self.served_bytes.labels(outcome).inc(nbytes)
        if outcome == "hit":
            self.saved_encode_seconds.inc(saved_seconds)

    def _step(self, name: str, text: str, *labels: str) -> Step:
        return Step(name, self._histogram(f"{name}_seconds", text, STEP_SECONDS, *labels))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)


def scheme_of(reference: str) -> str:
    """Return the scheme of an image reference, or "other": a label of few values."""
    scheme = reference[:8].partition(":")[0].lower()
    return scheme if scheme in _SCHEMES else "other"


def kind_of(hits: int, misses: int) -> RequestKind:
    """Say what a request's images were."""
    if hits and misses:
        return "mixed"
    if hits:
        return "hit"
    return "miss" if misses else "text"
