"""A real HTTP server for images on loopback, with validators, whose pictures can change."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ImageServer:
    """Bodies by path, and the status of each answer by path, in order. `max_age` 0 asks for revalidation.

    `redirects` are places by path; `heads` are the headers of every request, `connections` how many came.
    """

    url: str = ""
    max_age: int = 0
    bodies: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    heads: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0

    def put(self, path: str, body: bytes) -> str:
        """Serve `body` under `path`; return its URL."""
        self.bodies[path] = body
        return f"{self.url}{path}"


@contextmanager
def image_server() -> Iterator[ImageServer]:
    """Serve on a free port of 127.0.0.1."""
    state = ImageServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state.connections += 1

        def do_GET(self) -> None:
            state.heads.append({name.lower(): value for name, value in self.headers.items()})
            if place := state.redirects.get(self.path):
                state.answers.setdefault(self.path, []).append(302)
                self.send_response(302)
                self.send_header("Location", place)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = state.bodies.get(self.path)
            tag = f'"{hashlib.sha256(body or b"").hexdigest()[:16]}"'
            status = 404 if body is None else 304 if self.headers.get("If-None-Match") == tag else 200
            state.answers.setdefault(self.path, []).append(status)
            self.send_response(status)
            self.send_header("ETag", tag)
            self.send_header("Cache-Control", f"max-age={state.max_age}")
            self.send_header("Content-Type", "image/png")
            sent = body if status == 200 and body is not None else b""
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="image-server")
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
