"""The numbers of one request while it is answered: its metrics, its span, its one line in the log."""

from __future__ import annotations

import logging
import time

from opentelemetry.trace import Span

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.observability.logs import loggable_cause
from trtllm_mm_cache.pd.metrics import PdMetrics, RequestOutcome, kind_of
from trtllm_mm_cache.pd.resolved import ResolvedItems

logger = logging.getLogger(__name__)

Field = str | int | float | tuple[str, ...]


class AnswerRecord:
    """Begins when the request arrives; call `ended` or `stopped` exactly once.

    Times in seconds since the arrival.
    """

    def __init__(self, request_id: str, metrics: PdMetrics, span: Span) -> None:
        self._request_id = request_id
        self._metrics = metrics
        self._span = span
        self._arrived = time.perf_counter()
        self._items: ResolvedItems | None = None
        self._first_token: float | None = None
        self._finished = False
        self.tokens = 0
        metrics.in_flight.inc()

    def resolved(self, items: ResolvedItems) -> None:
        """The items have their embeddings."""
        self._items = items

    def generated(self, tokens: int, *, finished: bool) -> None:
        """`tokens` more tokens go to the client, the last of all answers to the request if `finished`."""
        self.tokens += tokens
        self._finished = finished
        if self._first_token is None and tokens and self._items is not None:
            self._first_token = self._elapsed()
            self._span.add_event("first_token")
            kind = kind_of(self._items.hits, self._items.misses)
            self._metrics.first_token.labels(kind).observe(self._first_token)

    def stopped(self) -> None:
        """No caller listens any more. Dynamo's frontend leaves with the last token, as soon as it has it."""
        self.ended("served" if self._finished else "stopped")

    def ended(self, outcome: RequestOutcome, error: MmCacheError | None = None) -> None:
        """Say how it ended; `error` is what the client is told. An engine's own error is its cause."""
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(outcome).inc()
        if error is not None:
            self._metrics.errors.labels(error.code).inc()
        fields = self._fields(outcome, error)
        self._span.set_attributes(fields)
        if self._items is not None:
            fields["keys"] = self._items.keys
        logger.log(
            _level(error),
            "request %s%s",
            " ".join(f"{name}={_text(value)}" for name, value in fields.items()),
            "" if error is None else f": {error}",
            extra=fields,
            exc_info=None if error is None else loggable_cause(error),
        )

    def _fields(self, outcome: RequestOutcome, error: MmCacheError | None) -> dict[str, Field]:
        fields: dict[str, Field] = {"request_id": self._request_id, "outcome": outcome}
        if error is not None:
            fields["code"] = error.code
        if self._items is not None:
            fields |= {
                "images": len(self._items.leases),
                "hits": self._items.hits,
                "misses": self._items.misses,
                "joined": self._items.joined,
                "bytes": self._items.nbytes,
                "images_s": round(self._items.seconds, 4),
            }
        if self._first_token is not None:
            fields["first_token_s"] = round(self._first_token, 4)
        return fields | {"tokens": self.tokens, "total_s": round(self._elapsed(), 4)}

    def _elapsed(self) -> float:
        return time.perf_counter() - self._arrived


def _text(value: Field) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _level(error: MmCacheError | None) -> int:
    """Choose: our own failures are errors, everybody else's warnings."""
    if error is None:
        return logging.INFO
    return logging.ERROR if error.http_status == 500 else logging.WARNING
