"""What an encode worker measures as it happens."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from trtllm_mm_cache.errors import error_codes
from trtllm_mm_cache.observability.buckets import BATCH_IMAGES, STEP_SECONDS
from trtllm_mm_cache.observability.exposition import PREFIX
from trtllm_mm_cache.observability.step import Step

ORIGINS: Final = ("encoded", "joined", "cached")
"""Where an embedding came from: the tower, a flight of another call, the worker's own arena."""


class EncodeMetrics:
    """Histograms and counters of one encode worker, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.preprocess = Step(
            "preprocess",
            self._histogram(
                "preprocess_seconds",
                "Decoding and preprocessing one image, the wait for a thread included.",
                STEP_SECONDS,
            ),
        )
        self.queue_wait = self._histogram(
            "encode_queue_wait_seconds", "An image's wait for the vision tower.", STEP_SECONDS
        )
        self.encode = self._histogram(
            "encode_seconds", "An image's share of its batch's time in the vision tower.", STEP_SECONDS
        )
        self.batch_images = self._histogram(
            "encode_batch_images", "Images in one run of the vision tower.", BATCH_IMAGES
        )
        self.embeddings = self._counter("embeddings", "Embeddings delivered, by origin.", "origin")
        self.saved_encode_seconds = self._counter(
            "saved_encode_seconds", "Vision tower seconds that the worker's own arena did not cost again."
        )
        self.errors = self._counter("errors", "Calls not served, by error code.", "code")
        for origin in ORIGINS:
            self.embeddings.labels(origin)
        for code in error_codes():
            self.errors.labels(code)

    def delivered(self, origin: str, *, encode_seconds: float) -> None:
        """Count one embedding that was exported; `encode_seconds` is what it had cost the tower."""
        self.embeddings.labels(origin).inc()
        if origin == "cached":
            self.saved_encode_seconds.inc(encode_seconds)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)
