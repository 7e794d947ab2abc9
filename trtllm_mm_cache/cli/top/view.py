"""Draws the figures: tables for a terminal, the same as plain text for anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trtllm_mm_cache.cli.top.figures import CacheFigures, EncodeWorkerFigures

_NONE = "-"


@dataclass(frozen=True)
class Frame:
    """All there is to show at one moment. `window_s` is 0 where the figures are since the workers' start."""

    window_s: float
    pd_workers: int
    cache: CacheFigures | None
    encode_workers: Sequence[EncodeWorkerFigures]
    breakers: Mapping[str, str]
    away: Mapping[str, str]


def draw(frame: Frame, *, plain: bool) -> RenderableType:
    """Return the frame as something rich can print; `plain` leaves out lines and colours."""
    parts: list[RenderableType] = [Text(_headline(frame), style="" if plain else "bold")]
    if frame.cache is not None:
        parts += [_cache_table(frame.cache, plain), _latency_table(frame.cache, plain)]
    if frame.encode_workers:
        parts.append(_encode_worker_table(frame, plain))
    parts += [Text(f"away: {name}: {why}", style="" if plain else "red") for name, why in frame.away.items()]
    return Group(*parts)


def _headline(frame: Frame) -> str:
    since = f"last {frame.window_s:.0f} s" if frame.window_s else "since start"
    return f"PD workers {frame.pd_workers}, encode workers {len(frame.encode_workers)}; {since}"


def _cache_table(cache: CacheFigures, plain: bool) -> Table:
    table = _table(plain, "cache", "", "requests", "")
    used = f"{_bytes(cache.current_bytes)} of {_bytes(cache.capacity_bytes)}"
    table.add_row("hit ratio", _percent(cache.hit_ratio), "requests/s", _rate(cache.requests_per_s))
    table.add_row("byte hit ratio", _percent(cache.byte_hit_ratio), "in flight", str(cache.in_flight))
    table.add_row("since start", _percent(cache.hit_ratio_since_start), "failed", str(cache.failed))
    table.add_row("embeddings", str(cache.entries), "joined lookups", str(cache.joined))
    table.add_row("bytes", used, "encode time saved", f"{cache.saved_seconds:.2f} s")
    table.add_row("evictions/s", _rate(cache.evictions_per_s), "", "")
    if cache.what_if:
        curve = ", ".join(f"{capacity} {_percent(ratio)}" for capacity, ratio in cache.what_if)
        table.add_row("what if", curve, "", "")
    return table


def _latency_table(cache: CacheFigures, plain: bool) -> Table:
    table = _table(plain, "time to first token", "requests", "p50", "p90")
    for latency in cache.latencies:
        table.add_row(
            latency.kind, str(latency.requests), _milliseconds(latency.p50), _milliseconds(latency.p90)
        )
    return table


def _encode_worker_table(frame: Frame, plain: bool) -> Table:
    table = _table(
        plain,
        "encode worker",
        "state",
        "encodes/s",
        "encodes",
        "queue",
        "batch",
        "encode p50",
        "2nd level",
        "arena",
        "exports",
    )
    for one in frame.encode_workers:
        table.add_row(
            one.name,
            frame.breakers.get(one.name, "up"),
            _rate(one.encodes_per_s),
            str(one.encodes),
            str(one.queued),
            _NONE if one.images_a_batch is None else f"{one.images_a_batch:.1f}",
            _milliseconds(one.encode_p50),
            _percent(one.second_level_ratio),
            _bytes(one.used_bytes),
            str(one.exports_held),
        )
    return table


def _table(plain: bool, first: str, *others: str) -> Table:
    table = Table(box=None if plain else box.SIMPLE, pad_edge=not plain, show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(ratio: float | None) -> str:
    return _NONE if ratio is None else f"{100 * ratio:.1f} %"


def _rate(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{1000 * seconds:.1f} ms"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
