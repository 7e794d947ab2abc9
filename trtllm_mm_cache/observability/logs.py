"""Logging of a worker process: to standard error, as text or as one JSON object a line."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from trtllm_mm_cache.errors import MmCacheError, RequestError

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the running task works for; lines logged meanwhile carry it in JSON."""

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure_logging(level: str, log_format: LogFormat = "text") -> None:
    """Send this package's log lines at `level` and above to standard error. Call once, at start.

    Third-party libraries are held to WARNING: their INFO lines may carry URLs of requests.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if log_format == "json" else _TextLines(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("trtllm_mm_cache").setLevel(level)


def loggable_cause(error: MmCacheError) -> BaseException | None:
    """Return the exception behind `error` where its text may be logged, for `exc_info`.

    What a library says about a client's request can name the host, the path or the content that the
    request led to; what the engine and the transfer say is about this deployment.
    """
    return None if isinstance(error, RequestError) else error.__cause__


class _TextLines(logging.Formatter):
    """One line a record: a message may quote a client, who must not be able to write lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if not record.message.isprintable():
            record.message = "".join(
                each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
                for each in record.message
            )
        return super().formatMessage(record)


class _JsonLines(JsonFormatter):
    """time, level, logger, message, the fields that the line was given, and the trace it belongs to."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger"}
        super().__init__(("levelname", "name", "message"), rename_fields=names)

    def process_log_record(self, log_data: dict[str, object]) -> dict[str, object]:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            log_data["trace_id"] = trace.format_trace_id(span.trace_id)
            log_data["span_id"] = trace.format_span_id(span.span_id)
        if current := request_id.get():
            log_data.setdefault("request_id", current)
        return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **log_data}
