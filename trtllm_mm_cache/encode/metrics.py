"""What an encode worker's calls come to."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter

from trtllm_mm_cache.encode.pipeline import Origin
from trtllm_mm_cache.errors import error_codes
from trtllm_mm_cache.observability.metrics import PREFIX


class EncodeMetrics:
    """Counters of one encode worker's calls, registered in `registry`. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.embeddings = Counter(
            f"{PREFIX}_embeddings", "Embeddings delivered, by origin.", ["origin"], registry=registry
        )
        self.saved_encode_seconds = Counter(
            f"{PREFIX}_saved_encode_seconds",
            "Vision tower seconds that the worker's own arena did not cost again.",
            registry=registry,
        )
        self.errors = Counter(
            f"{PREFIX}_errors", "Calls not served, by error code.", ["code"], registry=registry
        )
        for origin in get_args(Origin):
            self.embeddings.labels(origin)
        for code in error_codes():
            self.errors.labels(code)

    def delivered(self, origin: Origin, *, encode_seconds: float) -> None:
        """Count one embedding that was exported; `encode_seconds` is what it had cost the tower."""
        self.embeddings.labels(origin).inc()
        if origin == "cached":
            self.saved_encode_seconds.inc(encode_seconds)
