"""How full the arena gets and what holes cost, for three mixes of sizes; and the bookkeeping of an entry.

    python -m benchmarks.cache_utilization [--requests 12000]

Zipf traffic (exponent 0.8, six times as many items as fit) through `get` and `set`. Sizes and capacity
are a 1/64 of real ones (160 MB stand for 10 GB), so that the arena behaves as a large one and the run fits
any machine:

    one model     five sizes, 1.3 to 39 MB: Qwen2.5-VL-7B at common resolutions
    dynamic       0.2 to 50 MB, log-uniform: a dynamic-resolution model, every item another size
    two models    half of each of 4.7 MB sharp and 0.2 to 50 MB

Reported for each: utilisation when the first eviction happens and its mean over the second half; over that
half, bytes evicted against what an LRU cache without holes evicts on the same requests, the hit ratio (in
percent) of both, bytes moved against bytes evicted. Then the Python memory of an entry, by tracemalloc, with
100,000 entries. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import MB, finish, say
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

SCALE = 64
CAPACITY = 160 * MB
ONE_MODEL = [1.3, 2.5, 9.8, 19.6, 39.0]
ENTRIES = 100_000


def scaled(megabytes: float) -> int:
    """Return the size in this benchmark of `megabytes` of a real cache."""
    return round(megabytes * MB / SCALE) // 64 * 64


def dynamic(source: random.Random) -> int:
    """Draw a size between 0.2 and 50 MB, as likely below as above 3.2 MB."""
    return scaled(0.2 * 250 ** source.random())


MIXES: dict[str, Callable[[random.Random], int]] = {
    "one model": lambda source: scaled(source.choice(ONE_MODEL)),
    "dynamic": dynamic,
    "two models": lambda source: scaled(4.7) if source.random() < 0.5 else dynamic(source),
}


class WithoutHoles:
    """An LRU cache that only counts."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._used = 0
        self.hits = 0
        self.evicted_bytes = 0

    def request(self, item: int, nbytes: int) -> None:
        """Look `item` up, and store it when it is missing."""
        if item in self._sizes:
            self._sizes.move_to_end(item)
            self.hits += 1
            return
        while self._used + nbytes > CAPACITY:
            _, size = self._sizes.popitem(last=False)
            self._used -= size
            self.evicted_bytes += size
        self._sizes[item] = nbytes
        self._used += nbytes


def run_mix(draw: Callable[[random.Random], int], requests: int) -> dict[str, Any]:
    """Send the traffic of one mix through both caches."""
    source = random.Random(1)
    sizes = [draw(source)]
    while sum(sizes) < 6 * CAPACITY:
        sizes.append(draw(source))
    weights = [1 / (rank + 1) ** 0.8 for rank in range(len(sizes))]
    payload = torch.zeros(max(sizes), dtype=torch.uint8)
    manager, ideal = MultimodalEmbeddingCacheManager(CAPACITY), WithoutHoles()
    first_eviction: float | None = None
    fills: list[float] = []
    for number, item in enumerate(source.choices(range(len(sizes)), weights, k=requests)):
        if number == requests // 2:
            before, ideal_before = manager.statistics(), (ideal.hits, ideal.evicted_bytes)
        ideal.request(item, sizes[item])
        if manager.get(str(item)) is not None:
            continue
        full = manager.stats["utilization"]
        manager.set(str(item), CachedEmbedding(payload[: sizes[item]]))
        if manager.stats["evictions"]:
            first_eviction = first_eviction or full
        if number >= requests // 2:
            fills.append(manager.stats["utilization"])
    after = manager.statistics()
    evicted = after.evicted_bytes - before.evicted_bytes
    counted = requests - requests // 2
    manager.check_integrity()
    manager.close()
    return {
        "entries": after.entries,
        "utilisation_at_first_eviction": round(first_eviction or 0.0, 4),
        "utilisation_mean": round(sum(fills) / len(fills), 4),
        "utilisation_least": round(min(fills), 4),
        "evicted_to_ideal": round(evicted / (ideal.evicted_bytes - ideal_before[1]), 4),
        "hit_percent": round(100 * (after.hits - before.hits) / counted, 2),
        "hit_percent_ideal": round(100 * (ideal.hits - ideal_before[0]) / counted, 2),
        "moved_to_evicted": round((after.moved_bytes - before.moved_bytes) / evicted, 3),
    }


def bookkeeping(policy: str) -> float:
    """Return the bytes of Python memory an entry takes, key of 64 characters and metadata included."""
    capacity = ENTRIES * 64
    manager = MultimodalEmbeddingCacheManager(capacity, policy=make_policy(policy, capacity))
    payload = CachedEmbedding(torch.zeros(1, 32, dtype=torch.float16))
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(ENTRIES):
        grid = [[1, 32 + number % 64, 48]]
        manager.set(f"{number:064x}", payload._replace(image_grid_thw=grid))
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    entries = manager.statistics().entries
    manager.close()
    return round((after - before) / entries, 1)


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=12_000, help="requests of each mix")
    requests = parser.parse_args().requests
    torch.set_num_threads(1)
    mixes = {}
    for name, draw in MIXES.items():
        began = time.perf_counter()
        mixes[name] = run_mix(draw, requests)
        say(f"{name:>10} ({time.perf_counter() - began:.1f} s): {mixes[name]}")
    memory = {policy: bookkeeping(policy) for policy in ("lru", "s3fifo")}
    say(f"bookkeeping, bytes an entry: {memory}")
    finish(
        "cache_utilization",
        {"requests": requests, "seed": 1, "mixes": mixes, "bookkeeping_bytes_per_entry": memory},
    )


if __name__ == "__main__":
    main()
