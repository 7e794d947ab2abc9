"""Spans along the eight steps, across both workers' code, collected in this process; and their export."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.e2e.collector import Collector, collector, grpc_collector
from tests.pd.bench import Bench, image_url
from trtllm_mm_cache.errors import ConfigurationError, EncodeUnavailableError, MmCacheError
from trtllm_mm_cache.observability.traces import configure_tracing, remote_parent, span, trace_headers


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """The provider of a process can be set once; this file is the only one that sets it in the tests."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {one.name: one for one in spans.get_finished_spans()}


def parents(spans: InMemorySpanExporter) -> dict[str, str | None]:
    names = {one.context.span_id: one.name for one in spans.get_finished_spans() if one.context}
    return {
        one.name: names.get(one.parent.span_id) if one.parent else None for one in spans.get_finished_spans()
    }


async def test_the_steps_of_a_miss_and_of_a_hit(bench: Bench, spans: InMemorySpanExporter) -> None:
    reference = image_url()
    with span("request"):
        (await bench.resolve([reference])).release()
    assert parents(spans) == {
        "fetch": "request",
        "key": "request",
        "lookup": "request",
        "encode_call": "lookup",
        "reserve": "lookup",
        "transfer": "lookup",
        "commit": "lookup",
        "request": None,
    }
    spans.clear()
    with span("request"):
        (await bench.resolve([reference])).release()
    assert set(by_name(spans)) == {"fetch", "key", "lookup", "request"}


async def test_a_failed_step_has_the_errors_code_and_nothing_of_its_text(
    bench: Bench, spans: InMemorySpanExporter
) -> None:
    bench.peer.changes = [EncodeUnavailableError("at a secret address")] * 2
    with pytest.raises(MmCacheError):
        await bench.resolve([image_url()])
    failed = by_name(spans)["encode_call"]
    assert failed.status.description == "encode_unavailable"
    assert "secret" not in failed.to_json()


async def test_no_span_holds_a_reference_or_content(bench: Bench, spans: InMemorySpanExporter) -> None:
    reference = image_url()
    (await bench.resolve([reference])).release()
    with pytest.raises(MmCacheError):
        await bench.resolve(["https://user-secret.invalid/a.png?token=abc123"])
    everything = "".join(one.to_json() for one in spans.get_finished_spans())
    assert "user-secret" not in everything
    assert "abc123" not in everything
    assert reference[40:80] not in everything


def test_a_span_is_continued_in_another_process(spans: InMemorySpanExporter) -> None:
    with span("asking"):
        headers: dict[str, Any] = trace_headers()
    with span("answering", parent=remote_parent(headers)):
        pass
    assert parents(spans)["answering"] == "asking"


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": "nonsense"}, {"x-request-id": "1"}])
def test_without_a_valid_parent_a_trace_begins(
    spans: InMemorySpanExporter, headers: dict[str, str] | None
) -> None:
    with span("request", parent=remote_parent(headers)):
        pass
    assert by_name(spans)["request"].parent is None


def test_tracing_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = trace.get_tracer_provider()
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "0")
    configure_tracing("pd")
    assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(
    ("protocol", "serve"), [("grpc", grpc_collector), ("http/protobuf", collector), (None, grpc_collector)]
)
def test_spans_arrive_over_each_protocol(
    protocol: str | None, serve: Callable[[], AbstractContextManager[Collector]]
) -> None:
    code = (
        "from trtllm_mm_cache.observability.traces import configure_tracing, span\n"
        "configure_tracing('pd')\n"
        "with span('request', attributes={'images': 1}), span('lookup'): pass\n"
    )
    with serve() as traces:
        variables = {
            "OTEL_EXPORT_ENABLED": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{traces.port}",
            **({"OTEL_EXPORTER_OTLP_PROTOCOL": protocol} if protocol else {}),
        }
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stderr
        lookup, asked = traces.spans()
    assert (lookup.name, asked.name) == ("lookup", "request")
    assert (lookup.trace_id, lookup.parent_id) == (asked.trace_id, asked.span_id)
    assert (asked.service, asked.attributes) == ("trtllm-mm-cache-pd", {"images": "1"})


def test_an_unknown_protocol_is_the_operators_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigurationError, match="grpc or http/protobuf"):
        configure_tracing("pd")
