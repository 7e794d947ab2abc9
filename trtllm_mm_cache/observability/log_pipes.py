"""This side of the relay: the pipes to its process, and what happens when that ends before its time."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

_PIPE_BYTES = 1024**2  # what an unprivileged process may ask for: some thousand lines
_DRAIN_S = 2.0
_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
    "from trtllm_mm_cache.observability.log_relay import main\nmain()"
)


class LogPipes:
    """Two pipes to a relay: one of this process's own lines, one that the file descriptors became.

    `write` is for one thread at a time. `stderr` is the file descriptor of the real standard error.
    """

    def __init__(self, own: int, drained: int, stderr: int, streams: Sequence[int]) -> None:
        self.stderr = stderr
        self._own: int | None = own
        self._drained = drained
        self._streams = streams
        self._process = os.getpid()
        self._rest = b""

    @classmethod
    def start(cls, log_format: str, streams: Sequence[int]) -> Self:
        """Start a relay and put its pipe behind `streams`. Raises `ConfigurationError`."""
        _flush_python()
        own_end, own = os.pipe()
        others_end, others = os.pipe()
        drained, drained_end = os.pipe()
        for pipe in (own, others):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(own, False)
        theirs = (own_end, others_end, drained_end)
        try:
            # In a process group of its own, so that Ctrl-C leaves it to the end of what it relays.
            process = subprocess.Popen(
                [sys.executable, "-E", "-S", "-c", _PROGRAM, *map(str, theirs), log_format],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=theirs,
                process_group=0,
            )
        except OSError as error:
            raise ConfigurationError(f"the process that writes the log cannot start: {error}") from error
        stderr = os.dup(2)
        for stream in streams:
            os.dup2(others, stream)
        for pipe in (*theirs, others):
            os.close(pipe)
        pipes = cls(own, drained, stderr, streams)
        threading.Thread(target=pipes._watch, args=(process,), name="log relay", daemon=True).start()
        return pipes

    def write(self, text: str) -> bool:
        """Write `text`, which is formatted, and the end of its line; False without room. Never waits."""
        data = f"{text}\n".encode("utf-8", "backslashreplace")
        if self._own is None:
            os.write(self.stderr, data)
            return True
        try:
            self._rest = self._unsent(self._rest)
            if self._rest:
                return False
            self._rest = self._unsent(data)
        except BrokenPipeError:
            self._own = None
            return self.write(text)
        if self._rest == data:
            self._rest = b""
            return False
        return True

    def _unsent(self, data: bytes) -> bytes:
        """Write what there is room for and return the rest."""
        while data and self._own is not None:
            try:
                data = data[os.write(self._own, data) :]
            except BlockingIOError:
                break
        return data

    def flush(self) -> None:
        """Wait until all that was written is on standard error, at most 2 s. The process ends after it."""
        if self._own is None or os.getpid() != self._process:  # a fork of it ends
            return
        _flush_python()
        own, self._own = self._own, None
        os.close(own)
        select.select([self._drained], [], [], _DRAIN_S)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Go on without the relay when it has been killed: no write may go into a pipe without a reader."""
        status = process.wait()
        for stream in self._streams:
            os.dup2(self.stderr, stream)
        self._own = None
        logger.error(
            "the process that writes the log has ended (status %d): what native libraries write is no longer "
            "escaped until this process is restarted",
            status,
        )


def _flush_python() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
