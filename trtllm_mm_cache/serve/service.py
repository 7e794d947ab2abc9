"""One process of the stack, and the next one in its place: how it is started, and what its end means."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from trtllm_mm_cache.serve.child import Child, Children, open_log
from trtllm_mm_cache.serve.ports import bind_problem, free_port
from trtllm_mm_cache.serve.readiness import answers, listen, says_ready
from trtllm_mm_cache.serve.warm import WarmStart

_TAIL_LINES = 25
_TAIL_BYTES = 64 * 1024


class Kind(Enum):
    """What a process is, in the order of a request. They are ended in it, so that nothing is cut off."""

    FRONTEND = "frontend"
    PD = "PD worker"
    ENCODE = "encode worker"


@dataclass(frozen=True)
class Spec:
    """How to start a process.

    `arguments` are those of `trtllm-mm-cache`, `job` what stands before that command, `variables` what is
    added to the environment. `warm`: it may be forked from the process that has the engine. `drain_signal`
    tells it to finish; `end_signal` ends it, and is what the kernel sends when `serve` is killed. It serves
    when `probe`, a URL, answers; without one it says so by itself (`runtime.readiness`). `port` is that of
    its metrics; without one it gets one that is free. `python` runs it where it is not forked.
    """

    kind: Kind
    name: str
    arguments: Sequence[str]
    job: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    warm: bool = False
    python: str = sys.executable
    probe: str | None = None
    port: int | None = None
    drain_signal: signal.Signals = signal.SIGTERM
    end_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Life:
    """One process of a service. `ready` is done when it serves (True) or has ended before that (False).

    Its log begins at `log_start` bytes: those before it are its predecessors'.
    """

    child: Child
    ready: asyncio.Task[bool]
    log_start: int

    @property
    def serves(self) -> bool:
        """Whether it runs and has said that it serves."""
        return self.child.runs and self.ready.done() and self.ready.result()

    async def wait_ready(self) -> bool:
        """Return what `ready` will be; being cancelled does not cancel that."""
        return await asyncio.shield(self.ready)

    def end_text(self) -> str:
        """Say how it has ended."""
        status = self.child.ended.result()
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"has ended with status {status}"


class Service:
    """A place in the stack: the process in it may end and be started again, with the same port and log."""

    def __init__(self, spec: Spec, log: Path, children: Children, warm: WarmStart | None) -> None:
        self.spec = spec
        self.log = log
        self.life: Life | None = None
        self.port = spec.port or free_port()
        self._children = children
        self._warm = warm if spec.warm else None

    def __str__(self) -> str:
        return self.spec.name

    @property
    def serves(self) -> bool:
        """Whether there is a process in it that serves."""
        return self.life is not None and self.life.serves

    async def start(self, environment: Mapping[str, str]) -> Life:
        """Start a process and return it. Raises `OSError` when the system has none left."""
        variables = dict(self.spec.variables)
        if self.spec.port is None:
            if bind_problem(self.port) is not None:
                self.port = free_port()
            variables["DYN_SYSTEM_PORT"] = str(self.port)
        if self.spec.probe:
            serves = answers(self.spec.probe)
        else:
            variables["NOTIFY_SOCKET"], listener = listen()
            serves = says_ready(listener)
        output = open_log(self.log)
        try:
            log_start = os.fstat(output).st_size
            child = await self._fork(variables, output) or self._spawn({**environment, **variables}, output)
        finally:
            os.close(output)
        ready = asyncio.create_task(_first(serves, child.ended), name=f"ready: {self}")
        self.life = Life(child, ready, log_start)
        return self.life

    async def _fork(self, variables: Mapping[str, str], output: int) -> Child | None:
        if self._warm is None:
            return None
        name = f"mm-cache-{self.spec.arguments[0]}"
        return await self._warm.fork(self.spec.arguments, variables, output, name)

    def _spawn(self, environment: Mapping[str, str], output: int) -> Child:
        command = [*self.spec.job, self.spec.python, "-m", "trtllm_mm_cache.cli", *self.spec.arguments]
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._children.spawn(
                command, environment, output, end_signal=self.spec.end_signal, stdin=nothing
            )
        finally:
            os.close(nothing)

    def tail(self) -> list[str]:
        """Return the last lines that its latest process has logged."""
        start = self.life.log_start if self.life else 0
        with self.log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return [_printable(line) for line in text.splitlines()[-_TAIL_LINES:]]


async def _first(serves: Coroutine[Any, Any, None], ended: asyncio.Future[int]) -> bool:
    """Return whether `serves` returns before `ended` is done."""
    served = asyncio.create_task(serves)
    waiting: set[asyncio.Future[Any]] = {served, ended}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return served.done()
    finally:
        served.cancel()


def _printable(text: str) -> str:
    return "".join(
        each if each.isprintable() or each == "\t" else "\N{REPLACEMENT CHARACTER}" for each in text
    )
