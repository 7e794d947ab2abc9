"""The test's end of an exporter process."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from trtllm_mm_cache.transfer import Export, PeerMetadata

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 30.0


class RemoteExporter:
    """A running exporter process. Every answer is awaited with a deadline, off the event loop."""

    def __init__(self, *, capacity_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.exporter_process", str(capacity_bytes)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.peer: PeerMetadata

    async def start_agent(
        self, *, lease_timeout_s: float = 30.0, transports: str | None = None
    ) -> RemoteExporter:
        """Give the process a new NIXL agent and exporter, in place of those it may have."""
        answer = await self.do("start_agent", lease_timeout_s=lease_timeout_s, transports=transports)
        self.peer = PeerMetadata.from_wire(answer["peer"])
        return self

    async def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return await self._answer()

    async def export(self, key: str, nbytes: int) -> Export:
        return Export(**await self.do("export", key=key, nbytes=nbytes))

    def freeze(self) -> None:
        """Stop the process and return when every thread of it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=DEADLINE_S)

    def close(self) -> None:
        self.kill()
        self._listener.join(timeout=DEADLINE_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    async def _answer(self) -> dict[str, Any]:
        line = await asyncio.to_thread(self._answers.get, timeout=DEADLINE_S)
        assert line, "the exporter process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


async def until_statistic(exporter: RemoteExporter, name: str, value: int) -> None:
    """Wait until a statistic of the exporter has a value."""
    end = time.monotonic() + 10
    while (found := (await exporter.do("statistics"))[name]) != value:
        assert time.monotonic() < end, f"{name} is {found} and not {value}"
