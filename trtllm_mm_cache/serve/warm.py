"""Workers that start warm: forked from a process that has imported the engine.

Importing torch and transformers is nine tenths of a worker's start. One process does it, stays at that, and
forks a worker for each request. It never computes, opens no device and joins no deployment, so that what is
inherited is memory alone (pages that all workers share).

The worker is a grandchild of that process, and its parent ends at once: so it becomes a child of `serve`
(`attached.adopt_orphans`), ends with it, and does not depend on the process that forked it.

Messages, over a socket pair: "ready" when the imports are done; then, for each worker, a JSON object with
`arguments`, `environment` and `name`, and with it two file descriptors: its log, and a socket. On that the
worker says its pid and waits for an answer before it goes on.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.imports import without_collector
from trtllm_mm_cache.serve.attached import end_with, name_process
from trtllm_mm_cache.serve.child import Child, Children, open_log
from trtllm_mm_cache.settings import EngineName

_MOST_BYTES = 65536
_ADOPTED_S = 10.0
_FORK_S = 60.0


class WarmStart:
    """The process that forks workers, seen from `serve`. One event loop."""

    def __init__(
        self, children: Children, engine: EngineName, environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it; `environment` is that of every worker."""
        self._children = children
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        command = [sys.executable, "-m", "trtllm_mm_cache.cli", "warm-start", engine]
        output = open_log(log)
        # Asking CUDA whether there is a device would spoil it for forked processes; NVML can be asked.
        variables = {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with theirs:
            self._child = children.spawn(
                command, variables, output, end_signal=signal.SIGKILL, stdin=theirs.fileno()
            )
        os.close(output)
        self._imported = asyncio.create_task(self._wait_imported(), name="warm-start")

    async def fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: int, name: str
    ) -> Child | None:
        """Return a worker that runs `arguments` of the command line; None when it has to start cold.

        `environment` holds what differs from this process's own.
        """
        if not await asyncio.shield(self._imported):
            return None
        request = {"arguments": [*arguments], "environment": dict(environment), "name": name}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        loop = asyncio.get_running_loop()
        with ours:
            ours.setblocking(False)
            try:
                with theirs:
                    socket.send_fds(self._channel, [json.dumps(request).encode()], [log, theirs.fileno()])
                async with asyncio.timeout(_FORK_S):
                    said = await loop.sock_recv(ours, 32)
                if not said:
                    return None
                child = self._children.add(int(said))
                await loop.sock_sendall(ours, b"go")
            except OSError:  # TimeoutError is one
                return None
        return child

    async def close(self) -> None:
        """End it, the workers not."""
        self._channel.close()
        self._child.kill()
        await self._child.wait()
        await self._imported

    async def _wait_imported(self) -> bool:
        try:
            return await asyncio.get_running_loop().sock_recv(self._channel, 32) == b"ready"
        except OSError:
            return False


def fork_workers(engine: EngineName) -> list[str] | None:
    """Be the process that forks. Returns in each worker, with the arguments of its command line.

    Returns None when `serve` has closed the other end of standard input. Raises `ConfigurationError`.
    """
    name_process("mm-cache-warm")
    with without_collector():
        import trtllm_mm_cache.encode.process
        import trtllm_mm_cache.pd.process  # noqa: F401 - for the workers

        load_engine(engine)
    gc.freeze()
    serve = os.getppid()
    with socket.socket(fileno=os.dup(0)) as channel:
        channel.send(b"ready")
        while True:
            message, files, _, _ = socket.recv_fds(channel, _MOST_BYTES, 2)
            if not message:
                return None
            request = json.loads(message)
            if _fork_twice():
                log, serve_socket = files
                _become(request, log, socket.socket(fileno=serve_socket), serve)
                return list(request["arguments"])
            for file in files:
                os.close(file)


def _fork_twice() -> bool:
    """Fork a child that forks and ends; return whether this is the grandchild."""
    with warnings.catch_warnings():
        # Python warns of other threads. They are OpenBLAS's, which ends them before a fork by itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        middle = os.fork()
        if middle:
            os.waitpid(middle, 0)
            return False
        if os.fork():
            os._exit(0)
    return True


def _become(request: Mapping[str, Any], log: int, serve_socket: socket.socket, serve: int) -> None:
    """Turn this process into the worker of `request`, a child of the process `serve`."""
    deadline = time.monotonic() + _ADOPTED_S
    while os.getppid() != serve and time.monotonic() < deadline:
        time.sleep(0.001)
    end_with(serve, signal.SIGKILL)
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for file in (nothing, log):
        os.close(file)
    name_process(str(request["name"]))
    os.environ.update(request["environment"])
    with serve_socket:
        serve_socket.send(str(os.getpid()).encode())
        if not serve_socket.recv(32):
            os._exit(1)
