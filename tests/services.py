"""Processes of a stack, each started on its own, for tests that kill, freeze and restart them.

They are started through `setpriv --pdeathsig`: the kernel kills them when the thread that started them
ends, however it ends. So start them from a thread that lives as long as the test, such as the main one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.stack import Process, wait_until

WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Prefix of a command that must not outlive the process that starts it."""
CLI = (sys.executable, "-m", "trtllm_mm_cache.cli")
STOP_TIMEOUT_S = 30


def anonymous_bytes(pid: int) -> int:
    """Return what a process has of memory of its own, without arenas and files; 0 of one that has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int((status.partition("RssAnon:")[2].split() or ["0"])[0])


def files_that_outlive(pid: int) -> list[Path]:
    """Return the files of sockets and of Python's shared memory that a process and its descendants have."""
    found: set[str] = set()
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        found |= {str(connection.laddr) for connection in process.net_connections("unix")}
        found |= {mapped.path for mapped in process.memory_maps() if "/psm_" in mapped.path}
    return sorted(Path(name) for name in found if name.startswith("/"))


@dataclass
class Service:
    """One process that can be started again; each start has a log of its own in `folder`.

    `command` may have a prefix, such as `nsenter …`, that ends in an exec. `ready` stands in the log when
    it serves.
    """

    name: str
    command: Sequence[str]
    folder: Path
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)
    system_port: int = 0
    starts: int = 0
    _popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, also after it has ended."""
        assert not self.alive, f"{self.name} runs"
        self.starts += 1
        port = {"DYN_SYSTEM_PORT": str(self.system_port)} if self.system_port else {}
        with self.log.open("wb") as output:
            self._popen = subprocess.Popen(
                [*self.command],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **port, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> Path:
        """What it has said since its latest start."""
        return self.folder / f"{self.name}-{self.starts}.log"

    @property
    def process(self) -> Process:
        """The running process, for its metrics."""
        return Process(self.name, self.popen.pid, self.system_port, self.log)

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        """The latest process."""
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen

    @property
    def anonymous_bytes(self) -> int:
        """What it has of memory now, shared memory apart; 0 when it is gone."""
        return anonymous_bytes(self.popen.pid) if self.alive else 0

    @property
    def alive(self) -> bool:
        """Whether it runs, frozen or not."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it serves."""
        return self.alive and self.ready in self.log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Return when it serves; fails with the end of its log."""
        wait_until(lambda: self.is_ready or not self.alive, timeout_s, f"{self.name} was not ready")
        assert self.alive, f"{self.name} ended:\n" + "\n".join(self.log.read_text().splitlines()[-25:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL. Returns when it is gone."""
        self.signal(signal.SIGKILL)
        self.popen.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """End it as a supervisor does: SIGTERM, and SIGCONT in case it is frozen; return its status."""
        if self.alive:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
        return self.ended()

    def ended(self) -> int:
        """Wait for the end that it was asked for and return its status; fails when that takes too long."""
        try:
            return self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
