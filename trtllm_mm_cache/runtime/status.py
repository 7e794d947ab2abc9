"""The system port of a worker: probes and metrics, over a bounded number of connections.

Dynamo's own server on that port keeps every connection for ever: 300 idle ones took a worker with 256
descriptors out of service. It also lists the addresses of the worker's endpoints, for whoever asks.
"""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import EngineSettings

MAX_CONNECTIONS: Final = 32
"""Some scrapers and probes, each for milliseconds."""
_IDLE_S: Final = 5.0


class StatusServer:
    """Answers GET on /live (this process runs), /health (it serves) and /metrics, on threads of its own.

    Without a port it answers nothing. A connection is for one request, which must come within 5 s; beyond
    `MAX_CONNECTIONS` the oldest one is closed. `render` returns the metrics and is called on any thread.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Raises `ConfigurationError` when the port is taken."""
        self.ready = False
        self.render: Callable[[], str] = str
        self._server: _Server | None = None
        if settings.system_port is None:
            return
        loopback = settings.discovery_backend in ("file", "mem")
        address = settings.system_host or ("127.0.0.1" if loopback else "0.0.0.0")  # noqa: S104 - a pod's probes
        try:
            self._server = _Server((address, settings.system_port), self._answer)
        except OSError as error:
            raise ConfigurationError(
                f"--system-port {settings.system_port} (DYN_SYSTEM_PORT) on {address} cannot be opened: "
                f"{error.strerror}; set another one"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="status", daemon=True).start()

    @property
    def port(self) -> int | None:
        """The port that it listens on."""
        return None if self._server is None else self._server.server_address[1]

    def close(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, path: str) -> tuple[HTTPStatus, str, str]:
        """Return status, media type and body for a path."""
        match path.partition("?")[0]:
            case "/live":
                return HTTPStatus.OK, "application/json", '{"status": "live"}\n'
            case "/health" if self.ready:
                return HTTPStatus.OK, "application/json", '{"status": "ready"}\n'
            case "/health":
                return HTTPStatus.SERVICE_UNAVAILABLE, "application/json", '{"status": "notready"}\n'
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, self.render()
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", "there are /live, /health and /metrics\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # What finds no place in the queue comes again after a second, as long as a probe may take.
    request_queue_size = 512

    def __init__(
        self, address: tuple[str, int], answer: Callable[[str], tuple[HTTPStatus, str, str]]
    ) -> None:
        self.answer = answer
        self._open: OrderedDict[int, socket.socket] = OrderedDict()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take the connection; where there is no place, that of the oldest one, whose thread then ends."""
        if not self._places.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._open.values()), None)
                if oldest is not None:
                    _shut(oldest)
            self._places.acquire()
        with self._lock:
            self._open[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close the connection and give its place back."""
        with self._lock:
            mine = self._open.pop(id(request), None)
        super().shutdown_request(request)
        if mine is not None:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke off: whoever reaches the port could fill the log."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_S
    server: _Server
    server_version = "trtllm-mm-cache"
    sys_version = ""

    def do_GET(self) -> None:
        status, media_type, body = self.server.answer(self.path)
        content = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each probe."""


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself
