"""A process that is attached to another one does not outlive it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import wait_until
from trtllm_mm_cache.serve import attached

SLEEP = ("sleep", "1000")


def attached_to(parent: str, number: int) -> list[str]:
    return [sys.executable, "-I", "-S", attached.__file__, parent, str(number), *SLEEP]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_when_its_parent_is_killed(number: signal.Signals) -> None:
    script = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen({attached_to('PARENT', number)!r}[:4] + [str(os.getpid())] "
        f"+ {attached_to('PARENT', number)!r}[5:])\n"
        "print(child.pid, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_until(lambda: command_of(pid) == "sleep", 30, "it did not become the command")
        parent.kill()
    wait_until(lambda: not alive(pid), 30, "it has outlived its parent")


def test_it_does_not_begin_when_its_parent_has_ended_already() -> None:
    """As when the parent was killed between its fork and the child's first step."""
    ended = subprocess.run(attached_to("1", signal.SIGKILL), check=False, timeout=30)
    assert ended.returncode == 1
    assert os.getppid() != 1 or os.getpid() == 1
