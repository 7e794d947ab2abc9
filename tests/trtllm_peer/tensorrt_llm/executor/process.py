"""Starts the other process and carries requests and responses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from tensorrt_llm.executor.result import RequestOutput


class ExecutorProcess:
    """One process with one model. Requests from any thread; one thread reads the responses."""

    def __init__(self, role: str, model: str) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorrt_llm.executor.worker", role, model, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._results: dict[int, RequestOutput] = {}
        self._guard = threading.Lock()
        self._next_id = 0
        self._reader = threading.Thread(target=self._read, name="executor responses", daemon=True)

    def wait_until_ready(self) -> None:
        """Wait for the model; raises `RuntimeError` with the other side's reason."""
        try:
            ready = (
                self._connection.recv() if self._connection.poll(120) else "it said nothing for 120 seconds"
            )
        except EOFError:
            ready = "it ended"
        if ready != "ready":
            self.shutdown()
            raise RuntimeError(f"the executor did not start: {ready}")
        self._reader.start()

    def submit(self, request: dict[str, Any], prompt_token_ids: list[int]) -> RequestOutput:
        with self._guard:
            request_id, self._next_id = self._next_id, self._next_id + 1
            result = RequestOutput(request_id, prompt_token_ids, self.abort_request)
            self._results[request_id] = result
            self._connection.send(("request", request_id, request))
        return result

    def abort_request(self, request_id: int) -> None:
        with self._guard:
            self._connection.send(("abort", request_id, None))

    def shutdown(self) -> None:
        if self.process.poll() is None:
            try:
                with self._guard:
                    self._connection.send(("shutdown", 0, None))
                self.process.wait(20)
            except (OSError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        if self._reader.ident is not None:
            self._reader.join()
        self._connection.close()

    def _read(self) -> None:
        while True:
            try:
                request_id, response = self._connection.recv()
            except (EOFError, OSError):
                break
            result = self._results.pop(request_id) if response["final"] else self._results[request_id]
            result.put(response)
        for result in self._results.values():
            result.put({"final": True, "error": "the executor has ended"})
