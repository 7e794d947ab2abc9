"""Starts mpirun jobs and looks at them from outside: output, pids, exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.stack import wait_until

START_TIMEOUT_S = 120
END_TIMEOUT_S = 30.0
"""By when a worker that has lost a rank must be gone: under load mpirun itself took more than 5 s to end, and
what the ranks would wait for without our own watch is gloo's deadline, 120 s."""


class Job:
    """A running mpirun job and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        """Everything that mpirun and the ranks have printed."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until the job has printed `text`."""
        wait_until(
            lambda: text in self.output or self.process.poll() is not None, START_TIMEOUT_S, f"no {text!r}"
        )
        assert text in self.output, self.output

    def ranks(self) -> list[int]:
        """Return the pids of the ranks, rank 0 first."""
        return children_of(self.process.pid)

    def wait_ended(self, timeout_s: float) -> int:
        """Return mpirun's exit status; fails when it has none within `timeout_s`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"mpirun still runs after {timeout_s} s:\n{self.output}") from None


def children_of(mpirun_pid: int) -> list[int]:
    """Return the pids of the ranks that an mpirun has started, rank 0 first."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == mpirun_pid:
                environment = (entry / "environ").read_bytes().split(b"\0")
                (rank,) = (e for e in environment if e.startswith(b"OMPI_COMM_WORLD_RANK="))
                found.append((int(rank.partition(b"=")[2]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def runs(pid: int) -> bool:
    """Return whether a process runs; one that only waits for its parent's notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def mpirun(ranks: int, folder: Path, *arguments: str, **environment: str) -> Iterator[Job]:
    """Start `python ARGUMENTS` on so many ranks, as the launch script does; end them with the block."""
    command = ["mpirun", "-n", str(ranks), "--bind-to", "none"]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command += ["--oversubscribe"] if ranks > (os.cpu_count() or 1) else []
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    log = folder / "job.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, sys.executable, *arguments],
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield Job(process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(START_TIMEOUT_S)
