"""What the benchmarks share: ways measured in turn, medians, and the machine they ran on."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MB = 1024**2


def interleave(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Call every way once a round, after one round that does not count; return the seconds of each call.

    Whatever else loads the machine then loads all ways alike. The order is drawn anew for each round: each
    way finds the processor's caches as the one before it left them.
    """
    source = random.Random(1)
    order = list(ways.items())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        source.shuffle(order)
        for name, way in order:
            began = time.perf_counter()
            way()
            spent = time.perf_counter() - began
            if number:
                seconds[name].append(spent)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios round by round, which what comes and goes in between moves least."""
    return statistics.median(one / other for one, other in zip(numerators, denominators, strict=True))


def median_us(seconds: list[float]) -> float:
    """Return the median in microseconds."""
    return round(statistics.median(seconds) * 1e6, 2)


def median_ms(seconds: list[float]) -> float:
    """Return the median in milliseconds."""
    return round(statistics.median(seconds) * 1e3, 3)


def say(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


def finish(name: str, results: dict[str, Any], out: Path | None = None) -> None:
    """Print the results as one JSON object, with the machine's state at the end; keep it in `out`."""
    machine = {
        "cores": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    report = {"benchmark": name, "machine": machine, **results}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
