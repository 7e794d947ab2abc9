"""The process through which every line goes that another process writes to standard output or error.

Native libraries (Dynamo's runtime, UCX, CUDA) write to file descriptors 1 and 2 themselves, past any logger.
`logs.py` puts a pipe there and this process behind it: a thread in the same process could be kept from
reading by the interpreter's lock while the writer, who holds that lock, waits for room in the pipe; and it
would be gone when the last words of a process that aborts are to be read.

Lines of the process's own logger are formatted already and come through a second pipe, so that nobody else
can write one. Standard error may be a pipe whose reader stands still: then lines are dropped, and counted,
before the process is held up. The relay ends when the last writer has closed its end, and ignores signals.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime

from trtllm_mm_cache.observability.log_text import one_line

OUTPUT = "output"
"""The logger that lines of other writers are filed under."""

_READ_BYTES = 64 * 1024
_LINE_BYTES = 64 * 1024
_WAITING_BYTES = 8 * 1024**2
_FLUSH_S = 1.5
_LEVELS = {
    "TRACE": "DEBUG",
    "WARN": "WARNING",
    "FATAL": "CRITICAL",
    "PANIC": "CRITICAL",
    **{name: name for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")},
}
_ORDER = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LEVEL = re.compile(rf"\b({'|'.join(_LEVELS)})\b")
# "TIME LEVEL span:span: request_span: …". Dynamo lets its spans of requests through whatever DYN_LOG says.
_SPAN = re.compile(r"\S+\s+(TRACE|DEBUG|INFO|WARN|ERROR) (?:\S+: )?request_span: ")
# Its frontend leaves with the last token, or with an error's message; that nobody reads the end of the answer
# is no error.
_NO_READER = re.compile(
    r"\S+ ERROR (?:\S+: )?dynamo_runtime::\S+::push_handler: Failed to publish complete final for stream "
)


class Writer(threading.Thread):
    """Writes lines to standard error in the order of `put`; drops and counts what finds no room."""

    def __init__(self, log_format: str) -> None:
        super().__init__(name="writer", daemon=True)
        self._log_format = log_format
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting = self._lost = 0

    def put(self, line: bytes) -> None:
        """Take one line, without its end; never waits."""
        with self._changed:
            if self._waiting + len(line) > _WAITING_BYTES:
                self._lost += 1
                return
            if self._lost:
                text = f"{self._lost} log lines were lost: standard error was not read"
                self._add(_layout(text, "WARNING", self._log_format))
                self._lost = 0
            self._add(line)
            self._changed.notify_all()

    def _add(self, line: bytes) -> None:
        self._lines.append(line)
        self._waiting += len(line)

    def flush(self, timeout_s: float) -> None:
        """Wait until all is written, or as long as that."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def run(self) -> None:
        """Write until the process ends."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                lines, self._lines = self._lines, deque()
            self._write(b"\n".join(lines) + b"\n")
            with self._changed:
                self._waiting -= sum(map(len, lines))
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(sys.stderr.fileno(), data) :]
            except OSError:  # no reader any more: its processes go on all the same
                return


class Lines:
    """Cuts what comes through a pipe into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes; one that is too long counts as complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return lines

    def end(self) -> list[bytes]:
        """Return what came without a line's end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def formatted(line: bytes, log_format: str, dynamo_level: str) -> bytes | None:
    """Return what is written for a line of another writer; None for one that was not asked for.

    Its level is the first word in it that names one, else WARNING: nobody writes there when all is well.
    """
    text = line.decode("utf-8", "backslashreplace").rstrip("\r")
    if not text:
        return None
    span = _SPAN.match(text)
    if span and (dynamo_level == "OFF" or _rank(_LEVELS[span[1]]) < _rank(dynamo_level)):
        return None
    if _NO_READER.match(text):
        return None
    found = _LEVEL.search(text, 0, 200)
    level = _LEVELS[found[1]] if found else "WARNING"
    return _layout(one_line(text), level, log_format)


def _layout(text: str, level: str, log_format: str) -> bytes:
    now = datetime.now().astimezone()
    if log_format == "json":
        at = now.astimezone(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": at, "level": level, "logger": OUTPUT, "message": text}).encode()
    return f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} {level:<7} {OUTPUT}: {text}".encode()


def _rank(level: str) -> int:
    return _ORDER.index(level)


def dynamo_level(dyn_log: str) -> str:
    """Return the level that `DYN_LOG` has for everything without a directive of its own; Dynamo's is INFO."""
    for directive in reversed(dyn_log.split(",")):
        word = directive.strip().upper()
        if word == "OFF" or word in _LEVELS:
            return _LEVELS.get(word, "OFF")
    return "INFO"


def relay(own: int, others: int, drained: int, log_format: str) -> None:
    """Relay until both pipes have ended; close `drained` when all of `own` is written."""
    level = dynamo_level(os.environ.get("DYN_LOG", ""))
    writer = Writer(log_format)
    writer.start()
    open_pipes = {own: Lines(), others: Lines()}

    def take(pipe: int, lines: list[bytes]) -> None:
        for line in lines:
            if pipe == own:
                writer.put(line)
            elif (text := formatted(line, log_format, level)) is not None:
                writer.put(text)

    def read(timeout_s: float | None) -> bool:
        ready, _, _ = select.select(list(open_pipes), [], [], timeout_s)
        for pipe in ready:
            if data := os.read(pipe, _READ_BYTES):
                take(pipe, open_pipes[pipe].add(data))
            else:
                take(pipe, open_pipes.pop(pipe).end())
        return bool(ready)

    while own in open_pipes:
        read(None)
    end = time.monotonic() + _FLUSH_S
    while open_pipes and time.monotonic() < end and read(0):
        pass
    writer.flush(_FLUSH_S)
    os.close(drained)
    while open_pipes:
        read(None)
    writer.flush(_FLUSH_S)


def main() -> None:
    """Relay; the numbers of the pipes and the form of the lines are the arguments."""
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2"):
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)
    own, others, drained = map(int, sys.argv[1:4])
    relay(own, others, drained, sys.argv[4])
    os._exit(0)  # the writer may wait for a reader that never comes
