"""The engine's other process: opens handles, computes, answers. `python -m tensorrt_llm.executor.worker`."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Send = Callable[[dict[str, Any]], None]


class Executor:
    """Takes messages in the main thread, computes one request at a time in another."""

    def __init__(self, connection: Connection, compute: Callable[[dict[str, Any], Send, Any], None]) -> None:
        self._connection = connection
        self._compute = compute
        self._waiting: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._aborted: dict[int, threading.Event] = {}

    def run(self) -> None:
        computing = threading.Thread(target=self._compute_all)
        computing.start()
        while True:
            try:
                kind, request_id, request = self._connection.recv()
            except EOFError:
                kind = "shutdown"
            if kind == "request":
                self._aborted[request_id] = threading.Event()
                self._waiting.put((request_id, request))
            elif kind == "abort" and request_id in self._aborted:
                self._aborted[request_id].set()
            elif kind == "shutdown":
                break
        for event in list(self._aborted.values()):
            event.set()
        self._waiting.put(None)
        computing.join()

    def _compute_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            request_id, request = item

            def send(response: dict[str, Any], request_id: int = request_id) -> None:
                if response["final"]:
                    del self._aborted[request_id]
                self._connection.send((request_id, response))

            try:
                self._compute(request, send, self._aborted[request_id])
            except Exception as error:  # noqa: BLE001 - every request must end
                traceback.print_exc()
                send({"final": True, "error": f"{type(error).__name__}: {error}"})


def main() -> None:
    role, model, descriptor = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Ctrl-C reaches the whole group; the engine's owner ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # torch's shared-memory helper would inherit it, and the other side would wait for its end forever.
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    try:
        if role == "language":
            from tensorrt_llm.executor.language import LanguageModel

            compute: Callable[[dict[str, Any], Send, Any], None] = LanguageModel(model).answer
        else:
            from tensorrt_llm.executor.vision import VisionTower

            compute = VisionTower(model).encode
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
    connection.send("ready")
    Executor(connection, compute).run()


if __name__ == "__main__":
    main()
