"""The figures that `top` shows, computed from scrapes. None means: nothing to compute it from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_mm_cache.cli.top.scrape import CACHE, OURS, Interval, per_second, quantile

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
    joined: int
    saved_seconds: float
    what_if: tuple[tuple[str, float], ...]
    latencies: tuple[Latency, ...]


@dataclass(frozen=True)
class EncodeWorkerFigures:
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


def cache_figures(intervals: Sequence[Interval]) -> CacheFigures:
    """Compute the figures of the PD workers."""
    since_start = [Interval(interval.now) for interval in intervals]
    served = f"{OURS}_served_bytes_total"
    what_if = f"{OURS}_what_if_hit_ratio"
    first = max(intervals, key=lambda interval: interval.now.value(f"{OURS}_what_if_lookups"), default=None)
    return CacheFigures(
        hit_ratio=_hit_ratio(intervals),
        byte_hit_ratio=_ratio(_gained(intervals, served, outcome="hit"), _gained(intervals, served)),
        hit_ratio_since_start=_hit_ratio(since_start),
        entries=int(_now(intervals, f"{CACHE}_entries")),
        current_bytes=int(_now(intervals, f"{CACHE}_current_bytes")),
        capacity_bytes=int(_now(intervals, f"{OURS}_capacity_bytes", arena="cache")),
        evictions_per_s=per_second(intervals, f"{CACHE}_evictions_total"),
        requests_per_s=per_second(intervals, f"{OURS}_requests_total"),
        in_flight=int(_now(intervals, f"{OURS}_requests_in_flight")),
        failed=int(_gained(intervals, f"{OURS}_requests_total", outcome="failed")),
        joined=int(_gained(intervals, f"{OURS}_flights_joined_total")),
        saved_seconds=_gained(intervals, f"{OURS}_saved_encode_seconds_total"),
        what_if=tuple(sorted(first.now.label_values(what_if, "capacity").items())) if first else (),
        latencies=tuple(_latency(intervals, kind) for kind in KINDS),
    )


def encode_worker_figures(name: str, interval: Interval) -> EncodeWorkerFigures:
    """Compute the figures of one encode worker."""
    delivered = f"{OURS}_embeddings_total"
    images = interval.gained(f"{OURS}_encode_batch_images_sum")
    return EncodeWorkerFigures(
        name=name,
        encodes_per_s=per_second([interval], f"{OURS}_encodes_total"),
        encodes=int(interval.now.value(f"{OURS}_encodes_total")),
        queued=int(interval.now.value(f"{OURS}_encode_queue")),
        images_a_batch=_ratio(images, interval.gained(f"{OURS}_encode_batch_images_count")),
        encode_p50=quantile([interval], 0.5, f"{OURS}_encode_seconds"),
        second_level_ratio=_ratio(interval.gained(delivered, origin="cached"), interval.gained(delivered)),
        used_bytes=int(interval.now.value(f"{OURS}_arena_used_bytes")),
        exports_held=int(interval.now.value(f"{OURS}_exports_held")),
        failures=int(interval.gained(f"{OURS}_encode_failures_total")),
        timed_out=int(interval.gained(f"{OURS}_exports_total", outcome="timed_out")),
    )


def _latency(intervals: Sequence[Interval], kind: str) -> Latency:
    name = f"{OURS}_time_to_first_token_seconds"
    return Latency(
        kind,
        int(_gained(intervals, f"{name}_count", kind=kind)),
        quantile(intervals, 0.5, name, kind=kind),
        quantile(intervals, 0.9, name, kind=kind),
    )


def _hit_ratio(intervals: Sequence[Interval]) -> float | None:
    hits, misses = (_gained(intervals, f"{CACHE}_{what}_total") for what in ("hits", "misses"))
    return _ratio(hits, hits + misses)


def _gained(intervals: Sequence[Interval], name: str, **labels: str) -> float:
    return sum(interval.gained(name, **labels) for interval in intervals)


def _now(intervals: Sequence[Interval], name: str, **labels: str) -> float:
    return sum(interval.now.value(name, **labels) for interval in intervals)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
