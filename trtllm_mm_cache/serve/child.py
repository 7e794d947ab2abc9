"""Child processes: started attached to this one, and waited for in one place.

Workers are forked by another process and become children of this one (`warm`), and descendants that have lost
their parent do too (`attached.adopt_orphans`). So one handler of SIGCHLD reaps whatever has ended, known or
not, and nothing else in this process may wait for a child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from trtllm_mm_cache.serve import attached

_ORPHAN_S = 2.0


@dataclass(frozen=True)
class Child:
    """A process that leads a process group of its own. `ended` has its status; -N when signal N killed it."""

    pid: int
    ended: asyncio.Future[int]

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.done()

    async def wait(self) -> int:
        """Return its status when it has ended; being cancelled does not cancel `ended`."""
        return await asyncio.shield(self.ended)

    def signal(self, number: int) -> None:
        """Send a signal to the process alone, if it runs. It cannot meet another of that number."""
        if self.runs:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and whatever it has started in its group."""
        if self.runs:
            _kill_group(self.pid)


class Children:
    """The children of this process. Make one, on the main thread, in the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._known: dict[int, Child] = {}
        attached.adopt_orphans()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        *,
        end_signal: int,
        stdin: int,
    ) -> Child:
        """Start `command`, with the given file descriptors; the kernel sends it `end_signal` when we end."""
        wrapper = [sys.executable, "-I", "-S", attached.__file__, str(os.getpid()), str(int(end_signal))]
        pid = os.posix_spawn(
            sys.executable,
            [*wrapper, *command],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
            ],
            setpgroup=0,  # Ctrl-C is for us alone: we end the others in their order
            setsigdef=(
                signal.SIGINT,
                signal.SIGHUP,
            ),  # ignored in a background job, and that would be inherited
        )
        return self.add(pid)

    def add(self, pid: int) -> Child:
        """Return the child for a process that has just become one, and has not been waited for."""
        child = self._known[pid] = Child(pid, self._loop.create_future())
        return child

    async def kill_orphans(self) -> None:
        """Wait shortly for what the children left behind, which now belongs to us; then kill it."""
        deadline = self._loop.time() + _ORPHAN_S
        while psutil.Process().children() and self._loop.time() < deadline:  # noqa: ASYNC110 - none is known
            await asyncio.sleep(0.05)
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self._known.pop(ended.si_pid, None)
            if child is not None:  # while it is not waited for, no other group can have its number
                _kill_group(child.pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if child is not None:
                child.ended.set_result(os.waitstatus_to_exitcode(status))


def open_log(path: Path) -> int:
    """Open a log to append to, for its owner alone; return the file descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
