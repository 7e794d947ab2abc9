"""How exact the what-if curve is at its production settings, and what it costs a look-up.

    python -m benchmarks.cache_what_if [--length 200000] [--seeds 2]

Traffic over 100,000 images of 1 to 32 KiB (log-uniform; embeddings are some 300 times larger), a cache of
100 MiB. Each trace runs through the curve and through caches of 0.5, 1, 2 and 4 times the capacity that see
every request: libCacheSim's LRU, and our own S3-FIFO without bytes. The error is in points of hit ratio, over
the look-ups that the curve covers. Costs are medians of microseconds a call.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import libcachesim
import numpy as np

from benchmarks.measuring import finish, median_us, say
from trtllm_mm_cache.cache.what_if import FACTORS, MiniatureCache, WhatIf

OBJECTS = 100_000
CAPACITY = 100 * 1024**2
Trace = list[tuple[int, int]]


def traces(seed: int, length: int) -> dict[str, Trace]:
    """Make the traffic: what is asked for, and its size in bytes."""
    source = np.random.default_rng(seed)
    weights = 1 / np.arange(1, OBJECTS + 1) ** 0.9
    ranks = source.choice(OBJECTS, length, p=weights / weights.sum())
    turn = np.arange(length)
    chats = source.integers(0, 5000, length // 5)
    turns_of: dict[int, int] = {}
    talk = []
    for chat in chats.tolist():
        done = turns_of[chat] = turns_of.get(chat, -1) + 1
        first = (chat + 5000 * (done // 8)) * 12 + done % 8
        talk += range(first, first + 5)
    kinds = {
        "zipf": ranks,
        "scan-polluted": np.where(turn % 800 >= 500, OBJECTS + turn, ranks),
        "shifting": (ranks + turn // 2) % OBJECTS,
        "uniform": source.integers(0, OBJECTS, length),
        "conversations": np.array(talk),
    }
    sizes = (2 ** np.random.default_rng(seed).uniform(10, 15, 2_000_000)).astype(int) // 64 * 64
    return {
        name: list(zip(items.tolist(), sizes[items].tolist(), strict=True)) for name, items in kinds.items()
    }


def exact(policy: str, capacity: int) -> Callable[[int, int], bool]:
    """Return a cache that sees every request."""
    if policy == "lru":
        cache, request = libcachesim.LRU(capacity), libcachesim.Request()

        def ask_libcachesim(item: int, size: int) -> bool:
            request.obj_id, request.obj_size = item, size
            return bool(cache.get(request))

        return ask_libcachesim
    miniature = MiniatureCache(policy, capacity)

    def ask_miniature(item: int, size: int) -> bool:
        hit = miniature.look_up(str(item))
        miniature.admit(str(item), size)
        return hit

    return ask_miniature


def compare(policy: str, trace: Trace) -> dict[str, Any]:
    """Run one trace through the curve and the exact caches."""
    keys = {item: hashlib.blake2b(str(item).encode(), digest_size=32).hexdigest() for item, _ in trace}
    what_if = WhatIf(policy, CAPACITY)
    hits = {factor: [] for factor in FACTORS}
    for factor in FACTORS:
        ask = exact(policy, int(CAPACITY * factor))
        hits[factor] = [ask(item, size) for item, size in trace]
    for (item, size), hit in zip(trace, hits[1.0], strict=True):
        what_if.looked_up(keys[item], size if hit else None)
        if not hit:
            what_if.loaded(keys[item], size)
    curve = what_if.curve()
    percent = [100 * sum(hits[factor][-curve.lookups :]) / curve.lookups for factor in FACTORS]
    off = [100 * point.hit_ratio - true for point, true in zip(curve.points, percent, strict=True)]
    return {
        "hit_percent": [round(true, 1) for true in percent],
        "error_points": [round(points, 2) for points in off],
        "sampling_share": curve.sampling_share,
        "lookups": curve.lookups,
    }


def costs() -> dict[str, float]:
    """Return what a call costs, by what it finds, and the memory of a curve that follows all it may."""
    tracemalloc.start()
    what_if = WhatIf("lru", CAPACITY)
    for number in range(60_000):
        key = hashlib.blake2b(str(number).encode(), digest_size=32).hexdigest()
        what_if.looked_up(key, None)
        what_if.loaded(key, 9216)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    spent: dict[str, list[float]] = {"unsampled": [], "sampled hit": [], "sampled miss, loaded": []}

    def miss(key: str) -> None:
        what_if.looked_up(key, None)
        what_if.loaded(key, 9216)

    calls: dict[str, Callable[[str], None]] = {
        "unsampled": lambda key: what_if.looked_up("f" + key, 9216),
        "sampled miss, loaded": miss,
        "sampled hit": lambda key: what_if.looked_up(key, 9216),
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(20_000):
        key = f"{number:063x}"
        for name, call in calls.items():
            began = time.perf_counter()
            call(key)
            spent[name].append(time.perf_counter() - began)
    clock = []
    for _ in range(20_000):
        began = time.perf_counter()
        clock.append(time.perf_counter() - began)
    return {
        **{name: median_us(seconds) for name, seconds in spent.items()},
        "clock": round(statistics.median(clock) * 1e6, 2),
        "memory_mb": round(memory / 1024**2, 1),
    }


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=200_000, help="requests in a trace")
    parser.add_argument("--seeds", type=int, default=2, help="traces of each kind")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(1, arguments.seeds + 1):
        for name, trace in traces(seed, arguments.length).items():
            for policy in ("lru", "s3fifo"):
                rows[f"{policy} {name} seed {seed}"] = row = compare(policy, trace)
                say(f"{policy:>7} {name:14} seed {seed}: {row}")
    worst = max(abs(points) for row in rows.values() for points in row["error_points"])
    results = {"worst_error_points": worst, "us_a_call": costs(), "rows": rows}
    say(f"worst error {worst} points; costs {results['us_a_call']}")
    finish("cache_what_if", results)


if __name__ == "__main__":
    main()
