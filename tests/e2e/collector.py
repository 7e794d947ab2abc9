"""OpenTelemetry collectors on loopback, over HTTP and over gRPC: they take spans and keep them."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Received:
    """One span as it came: ids in hex, the service that sent it, attributes as text."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str]


class Collector:
    """What has come so far."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self._lock = threading.Lock()
        self._spans: list[Received] = []
        self.port = 0

    def spans(self, trace_id: str | None = None) -> list[Received]:
        """Return the spans of one trace, or all."""
        with self._lock:
            return [span for span in self._spans if trace_id in (None, span.trace_id)]

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            Received(
                name=span.name,
                service=_attributes(resource.resource.attributes).get("service.name", ""),
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                attributes=_attributes(span.attributes),
            )
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += spans
            self.bodies.append(body)


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """Serve a collector over HTTP until the block ends."""
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                kept.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def grpc_collector() -> Iterator[Collector]:
    """Serve a collector over gRPC until the block ends."""
    kept = Collector()

    class Servicer(TraceServiceServicer):
        def Export(  # noqa: N802 - gRPC's name
            self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
        ) -> ExportTraceServiceResponse:
            kept.take(request.SerializeToString())
            return ExportTraceServiceResponse()

    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        add_TraceServiceServicer_to_server(Servicer(), server)
        kept.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield kept
        finally:
            server.stop(None).wait()


def _attributes(pairs: object) -> dict[str, str]:
    return {
        pair.key: str(getattr(pair.value, pair.value.WhichOneof("value") or "string_value"))
        for pair in pairs  # type: ignore[attr-defined]
    }
