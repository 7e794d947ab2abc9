"""The figures that `top` shows, computed from scrapes. None means: nothing to compute it from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_mm_cache.cli.top.scrape import CACHE, OURS, Span, per_second, quantile

KINDS = ("hit", "mixed", "miss", "text")


@dataclass(frozen=True)
class Latency:
    """Time to first token of one kind of request, in seconds."""

    kind: str
    requests: int
    p50: float | None
    p90: float | None


@dataclass(frozen=True)
class CacheFigures:
    """What all PD workers together serve from cache."""

    hit_ratio: float | None
    byte_hit_ratio: float | None
    hit_ratio_since_start: float | None
    entries: int
    current_bytes: int
    capacity_bytes: int
    evictions_per_s: float | None
    requests_per_s: float | None
    in_flight: int
    failed: int
    coalesced: int
    saved_seconds: float
    what_if: tuple[tuple[str, float], ...]
    latencies: tuple[Latency, ...]


@dataclass(frozen=True)
class EncoderFigures:
    """One encode worker."""

    name: str
    encodes_per_s: float | None
    encodes: int
    queued: int
    images_a_batch: float | None
    encode_p50: float | None
    second_level_ratio: float | None
    used_bytes: int
    exports_held: int
    failures: int
    timed_out: int


def cache_figures(spans: Sequence[Span]) -> CacheFigures:
    """Compute the figures of the PD workers."""
    since_start = [Span(span.now) for span in spans]
    served = f"{OURS}_served_bytes_total"
    what_if = f"{OURS}_what_if_hit_ratio"
    first = max(spans, key=lambda span: span.now.value(f"{OURS}_what_if_lookups"), default=None)
    return CacheFigures(
        hit_ratio=_hit_ratio(spans),
        byte_hit_ratio=_ratio(_gained(spans, served, outcome="hit"), _gained(spans, served)),
        hit_ratio_since_start=_hit_ratio(since_start),
        entries=int(_now(spans, f"{CACHE}_entries")),
        current_bytes=int(_now(spans, f"{CACHE}_current_bytes")),
        capacity_bytes=int(_now(spans, f"{OURS}_capacity_bytes", arena="cache")),
        evictions_per_s=per_second(spans, f"{CACHE}_evictions_total"),
        requests_per_s=per_second(spans, f"{OURS}_requests_total"),
        in_flight=int(_now(spans, f"{OURS}_requests_in_flight")),
        failed=int(_gained(spans, f"{OURS}_requests_total", outcome="failed")),
        coalesced=int(_gained(spans, f"{OURS}_flights_joined_total")),
        saved_seconds=_gained(spans, f"{OURS}_saved_encode_seconds_total"),
        what_if=tuple(sorted(first.now.label_values(what_if, "capacity").items())) if first else (),
        latencies=tuple(_latency(spans, kind) for kind in KINDS),
    )


def encoder_figures(name: str, span: Span) -> EncoderFigures:
    """Compute the figures of one encode worker."""
    delivered = f"{OURS}_embeddings_total"
    images = span.gained(f"{OURS}_encode_batch_images_sum")
    return EncoderFigures(
        name=name,
        encodes_per_s=per_second([span], f"{OURS}_encodes_total"),
        encodes=int(span.now.value(f"{OURS}_encodes_total")),
        queued=int(span.now.value(f"{OURS}_encode_queue")),
        images_a_batch=_ratio(images, span.gained(f"{OURS}_encode_batch_images_count")),
        encode_p50=quantile([span], 0.5, f"{OURS}_encode_seconds"),
        second_level_ratio=_ratio(span.gained(delivered, origin="cached"), span.gained(delivered)),
        used_bytes=int(span.now.value(f"{OURS}_arena_used_bytes")),
        exports_held=int(span.now.value(f"{OURS}_exports_held")),
        failures=int(span.gained(f"{OURS}_encode_failures_total")),
        timed_out=int(span.gained(f"{OURS}_exports_total", outcome="timed_out")),
    )


def _latency(spans: Sequence[Span], kind: str) -> Latency:
    name = f"{OURS}_time_to_first_token_seconds"
    return Latency(
        kind,
        int(_gained(spans, f"{name}_count", kind=kind)),
        quantile(spans, 0.5, name, kind=kind),
        quantile(spans, 0.9, name, kind=kind),
    )


def _hit_ratio(spans: Sequence[Span]) -> float | None:
    hits, misses = (_gained(spans, f"{CACHE}_{what}_total") for what in ("hits", "misses"))
    return _ratio(hits, hits + misses)


def _gained(spans: Sequence[Span], name: str, **labels: str) -> float:
    return sum(span.gained(name, **labels) for span in spans)


def _now(spans: Sequence[Span], name: str, **labels: str) -> float:
    return sum(span.now.value(name, **labels) for span in spans)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
