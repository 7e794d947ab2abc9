"""Logging of a process: to standard error, as text or as one JSON object a line, whoever wrote the line."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

from trtllm_mm_cache.errors import MmCacheError, RequestError
from trtllm_mm_cache.observability.log_pipes import LogPipes
from trtllm_mm_cache.observability.log_text import indented, one_line

logger = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the running task works for; lines logged meanwhile carry it in JSON."""

LogFormat = Literal["text", "json"]

_TRACES = ("exc_info", "stack_info")
_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure_logging(level: str, log_format: LogFormat = "text", *, streams: Sequence[int] = (1, 2)) -> None:
    """Send this package's log lines at `level` and above to standard error. Call once, at start.

    From then on what anybody in this process or its children writes to the file descriptors `streams` comes
    out on standard error too, as log lines of the logger `output` (`log_relay.py`). A command that prints its
    results keeps 1 for them. No call of a logger ever waits: lines that find no room are dropped and counted.

    Third-party libraries are held to WARNING: their INFO lines may carry URLs of requests.
    """
    global _handler  # noqa: PLW0603 - there is one standard error in a process
    pipes = LogPipes.start(log_format, streams)
    _handler = handler = _PipeHandler(pipes)
    handler.setFormatter(_JsonLines() if log_format == "json" else _TextLines(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("trtllm_mm_cache").setLevel(level)
    logging.captureWarnings(True)
    faulthandler.enable(2)  # by the relay, which outlives this process and tears no line
    atexit.register(pipes.flush)


def say(message: str) -> None:
    """Tell whoever started this process why it fails: one line as it is, in JSON an ERROR of the log."""
    line = one_line(message)
    if _handler is None:
        print(line, file=sys.stderr)
    elif isinstance(_handler.formatter, _JsonLines):
        logger.error("%s", line)
    else:
        _handler.pipes.write(line)


def loggable_cause(error: MmCacheError) -> BaseException | None:
    """Return the exception behind `error` where its text may be logged, for `exc_info`.

    What a library says about a client's request can name the host, the path or the content that the
    request led to; what the engine and the transfer say is about this deployment.
    """
    return None if isinstance(error, RequestError) else error.__cause__


class _PipeHandler(logging.Handler):
    """Hands formatted records to the relay. `lost` counts those without room since the last that had some."""

    def __init__(self, pipes: LogPipes) -> None:
        super().__init__()
        self.pipes = pipes
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if self.lost:
                text = f"{self.format(_lost(self.lost))}\n{text}"
            self.lost = 0 if self.pipes.write(text) else self.lost + 1
        except Exception:  # noqa: BLE001 - logging's own rule: a line that cannot be logged stops nothing
            self.handleError(record)


def _lost(count: int) -> logging.LogRecord:
    text = "%d log lines were lost: the log's process did not keep up"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (count,), None)


_handler: _PipeHandler | None = None


class _TextLines(logging.Formatter):
    """One line a record, and below it the lines of a traceback, each marked as such.

    A message may quote a client, and an exception's text too.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return indented(stack_info)


class _JsonLines(JsonFormatter):
    """time, level, logger, message, the fields that the line was given, and the trace it belongs to."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger"}
        super().__init__(("levelname", "name", "message"), rename_fields=names)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            log_data["trace_id"] = trace.format_trace_id(span.trace_id)
            log_data["span_id"] = trace.format_span_id(span.span_id)
        if current := request_id.get():
            log_data.setdefault("request_id", current)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return {"time": now, **{name: _safe(value, name) for name, value in log_data.items()}}


def _safe(value: Any, name: str = "") -> Any:
    """Return a field of that name with every text in it as one line; of a traceback each line is one."""
    if isinstance(value, str):
        return "\n".join(map(one_line, value.splitlines())) if name in _TRACES else one_line(value)
    if isinstance(value, Mapping):
        return {one_line(str(name)): _safe(inner) for name, inner in value.items()}
    if isinstance(value, Sequence):
        return [_safe(inner) for inner in value]
    return value
