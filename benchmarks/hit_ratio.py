"""Hit ratio against capacity, for each eviction policy, through the real cache.

    python -m benchmarks.hit_ratio [--requests 20000]

Traffic: `zipf`, where the same pictures are popular all the time (4,000 pictures, exponent 0.9), and
`scans`, where every 500 such requests somebody goes through 300 pictures that nobody asks for again.
Embeddings are 1 to 32 KiB, 300 times smaller than real ones, and so is the cache: capacities are given as a
share of the bytes of all pictures that were asked for. The first tenth of the requests fills the cache and
is not counted. `best` is what a cache without limit gets. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import finish
from tests.cache.traces import Trace, scan_polluted, zipf
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

TRAFFIC = {"zipf": zipf, "scans": scan_polluted}
POLICIES = ("lru", "s3fifo")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def hits(trace: Trace, capacity: int, policy: str, skipped: int) -> float:
    """Return the share of the requests after the first `skipped` that the cache answers."""
    payload = torch.zeros(max(size for _, size in trace), dtype=torch.uint8)
    manager = MultimodalEmbeddingCacheManager(capacity, policy=make_policy(policy, capacity))
    for number, (item, size) in enumerate(trace):
        if number == skipped:
            before = manager.statistics().hits
        if manager.get(str(item)) is None:
            manager.set(str(item), CachedEmbedding(payload[:size]))
    counted = manager.statistics().hits - before
    manager.close()
    return counted / (len(trace) - skipped)


def unlimited(trace: Trace, skipped: int) -> float:
    """Return the share of the requests after the first `skipped` whose picture came before."""
    seen: set[int] = set()
    counted = 0
    for number, (item, _) in enumerate(trace):
        counted += number >= skipped and item in seen
        seen.add(item)
    return counted / (len(trace) - skipped)


def measure(requests: int) -> dict[str, Any]:
    """Run every traffic through every policy at every capacity."""
    report: dict[str, Any] = {}
    with tqdm(total=len(TRAFFIC) * len(POLICIES) * len(SHARES)) as bar:
        for name, make in TRAFFIC.items():
            trace = make(1, requests)
            working_set = sum(dict(trace).values())
            curves: dict[str, list[float]] = {policy: [] for policy in POLICIES}
            for policy in POLICIES:
                for share in SHARES:
                    bar.set_description(f"{name}, {policy}")
                    capacity = max(round(working_set * share), 64 * 1024)
                    curves[policy].append(round(hits(trace, capacity, policy, requests // 10), 4))
                    bar.update()
            best = round(unlimited(trace, requests // 10), 4)
            report[name] = {"working_set_bytes": working_set, "hit_ratio": curves, "best": best}
    return {"requests": requests, "capacity_shares": list(SHARES), "traffic": report}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000, help="of each traffic")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    finish("hit_ratio", measure(options.requests), options.out)


if __name__ == "__main__":
    main()
