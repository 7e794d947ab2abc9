"""SIGTERM to the whole launch script: what runs is finished, nothing new is taken, the status is 0."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai

from tests.e2e.cards import MAX_TOKENS, Deal
from tests.e2e.stack import STOP_TIMEOUT_S, launched, message, png, wait_until


class SlowImageServer:
    """Sends one picture, when it is told to."""

    def __init__(self, body: bytes) -> None:
        self.asked, self.send = threading.Event(), threading.Event()
        self._body = body
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/card.png"

    def serve(self) -> None:
        """Answer the PD worker when told to; no other process asks."""
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            self.asked.set()
            assert self.send.wait(60)
            head = "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nConnection: close\r\n"
            connection.sendall(f"{head}Content-Length: {len(self._body)}\r\n\r\n".encode() + self._body)

    def close(self) -> None:
        """Take no more requests."""
        self._listener.close()


@contextmanager
def slow_server(body: bytes) -> Iterator[SlowImageServer]:
    server = SlowImageServer(body)
    thread = threading.Thread(target=server.serve, name="slow-image-server")
    thread.start()
    try:
        yield server
    finally:
        server.send.set()
        thread.join(60)
        server.close()


def test_sigterm_finishes_what_runs_takes_nothing_new_and_exits_0(
    tmp_path: Path, model_dir: Path, deal: Deal
) -> None:
    asked = deal()
    options = ("--multimodal-embedding-cache-capacity-gb", "0.03125", "--allow-private-addresses")
    with (
        ThreadPoolExecutor(1) as pool,
        slow_server(png(asked.pictures[0])) as server,
        launched(tmp_path / "run", *options, MODEL_PATH=str(model_dir)) as stack,
    ):
        # Its picture is still being fetched, so it needs the encode worker after the signal has come.
        waiting = pool.submit(stack.ask, server.url, asked.text, max_tokens=MAX_TOKENS, temperature=0)
        assert server.asked.wait(30)
        long = stack.client.chat.completions.create(
            model=stack.model,
            messages=[message("Tell me everything")],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(long)]
        stack.launcher.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in stack.log.read_text(), 10, "the launch script did not drain")

        def refuses() -> bool:
            try:
                stack.ask("Hello")
            except (openai.APIConnectionError, openai.InternalServerError):
                return True
            return False

        wait_until(refuses, 10, "new requests are still taken")
        server.send.set()
        assert waiting.result(30) == asked.answer
        chunks += long
        assert chunks[-1].choices[0].finish_reason == "length", "the long answer was cut off"
        assert stack.launcher.wait(STOP_TIMEOUT_S) == 0, stack.log.read_text()
        for process in stack.processes:
            assert not process.alive()
            assert "Traceback" not in process.log.read_text(), process.log.read_text()
