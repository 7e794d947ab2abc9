"""The numbers of one request while it is answered: its metrics, and its one line in the log."""

from __future__ import annotations

import logging
import time

from trtllm_mm_cache.observability.pd_metrics import PdMetrics, RequestOutcome, kind_of
from trtllm_mm_cache.workers.resolver import ResolvedImages

logger = logging.getLogger(__name__)


class AnswerRecord:
    """Begins when the request arrives; call `ended` or `left` exactly once.

    Times in seconds since the arrival.
    """

    def __init__(self, request_id: str, metrics: PdMetrics) -> None:
        self._request_id = request_id
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._images: ResolvedImages | None = None
        self._first_token: float | None = None
        self._tokens = 0
        self._finished = False
        metrics.in_flight.inc()

    def resolved(self, images: ResolvedImages) -> None:
        """The images are there."""
        self._images = images

    def generated(self, tokens: int, *, finished: bool) -> None:
        """`tokens` more tokens go to the client, the answer's last ones if it is `finished`."""
        self._tokens += tokens
        self._finished = finished
        if self._first_token is None and tokens and self._images is not None:
            self._first_token = self._elapsed()
            kind = kind_of(self._images.hits, self._images.misses)
            self._metrics.first_token.labels(kind).observe(self._first_token)

    def left(self) -> None:
        """Nobody listens any more. Dynamo's frontend leaves with the last token, as soon as it has it."""
        self.ended("served" if self._finished else "stopped")

    def ended(self, outcome: RequestOutcome, *, code: str | None = None) -> None:
        """Say how it ended; `code` is that of the error, where there was one."""
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(outcome).inc()
        if code is not None:
            self._metrics.errors.labels(code).inc()
        fields = self._fields(outcome, code)
        logger.info("request %s", " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)

    def _fields(self, outcome: RequestOutcome, code: str | None) -> dict[str, str | int | float]:
        fields: dict[str, str | int | float] = {"request_id": self._request_id, "outcome": outcome}
        if code is not None:
            fields["code"] = code
        if self._images is not None:
            fields |= {
                "images": len(self._images.leases),
                "hits": self._images.hits,
                "misses": self._images.misses,
                "joined": self._images.joined,
                "bytes": self._images.nbytes,
                "images_s": round(self._images.seconds, 4),
            }
        if self._first_token is not None:
            fields["first_token_s"] = round(self._first_token, 4)
        return fields | {"tokens": self._tokens, "total_s": round(self._elapsed(), 4)}

    def _elapsed(self) -> float:
        return time.perf_counter() - self._arrived
