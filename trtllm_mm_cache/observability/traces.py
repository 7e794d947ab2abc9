"""OpenTelemetry spans. Without a configured provider they are the API's no-ops.

Spans carry sizes, times, outcomes and error codes. Exceptions are not recorded on them, as OpenTelemetry does
by default, because the text of a library's exception can name what a client's request led to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from trtllm_mm_cache.errors import ConfigurationError, MmCacheError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_tracer = trace.get_tracer("trtllm_mm_cache")
_propagator = TraceContextTextMapPropagator()


def configure_tracing(role: str) -> None:
    """Export this process's spans where Dynamo's are exported: OTEL_EXPORT_ENABLED is set. Else nothing.

    The other variables are OpenTelemetry's own (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_SERVICE_NAME, ...).
    Raises `ConfigurationError` when the `tracing` extra is missing or the protocol is unknown.
    """
    if os.environ.get("OTEL_EXPORT_ENABLED", "").lower() not in {"1", "true", "yes", "on"}:
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter()
    except ImportError as error:
        raise ConfigurationError(
            "OTEL_EXPORT_ENABLED is set, but OpenTelemetry's SDK is not installed: pip install "
            "'trtllm-mm-cache[tracing]', or unset it"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", f"trtllm-mm-cache-{role}")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@contextmanager
def span(
    name: str,
    *,
    parent: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Iterator[Span]:
    """Open a span around a block; an error that leaves the block sets its status to the error's code."""
    opened = _tracer.start_as_current_span(
        name,
        context=parent,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    )
    with opened as current:
        try:
            yield current
        except Exception as error:
            code = error.code if isinstance(error, MmCacheError) else type(error).__name__
            current.set_status(Status(StatusCode.ERROR, code))
            raise


def remote_parent(headers: Mapping[str, str] | None) -> Context | None:
    """Return the context that W3C trace headers describe, for `span`'s `parent`; None where there is none."""
    return _propagator.extract(headers) if headers and "traceparent" in headers else None


def trace_headers() -> dict[str, str]:
    """Return the current span as W3C trace headers for another process; empty where there is none."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    return headers


def _exporter() -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ConfigurationError(
        f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL={protocol} is not served; set grpc or http/protobuf"
    )
