"""vLLM with and without an embedding cache: time to the first token and throughput, from an image's file on.

    python -m benchmarks.vllm [--peer FOLDER] [--rounds 3] [--repeats 3] [--sizes "1 MB" ...]

One model (`vllm_model.py`) and the same images for all. Each round starts every arm's engine once, in an
order drawn anew, one at a time. `vllm`: alone. `example`: its ECExampleConnector, on /dev/shm. `dynamo`:
Dynamo 1.6.1's connector from `--peer`, the folder where `make bench-transfer` puts ai-dynamo, told that its
device is the CPU. `aggregated` and `disaggregated` are ours; the latter encodes with transformers' tower in
the same process. `text`: vLLM alone, asked with a text of as many tokens.

An image is new (`miss`), then asked about again (`hit`) with vLLM's own caches empty: that a hit encoded
nothing, and that vLLM alone encoded again, is counted. Requests a second are of four under way together.
vLLM's processor keeps what it made of an image, as is its default; with ours it never sees a hit. In the
engine of `aggregated` other new images go past us, in turn with some that do not: engines differ by more
from one start to the next than by what a miss costs. The ratios compare the medians of one round. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import finish, say
from benchmarks.vllm_arms import FOLDER_VARIABLE
from benchmarks.vllm_model import HIDDEN, LEVELS, write_wide_model

SIZES = {
    "1 MB": (224, 224),
    "448 px": (448, 448),
    "10 MB": (736, 704),
    "1024 px": (1024, 1024),
    "35 MB": (1344, 1312),
}
ARMS = ("vllm", "example", "dynamo", "aggregated", "disaggregated", "text")
ARM_TIMEOUT_S = 1800

Found = dict[str, dict[str, list[float]]]


def run_arm(arm: str, plan: dict[str, Any], peer: Path | None) -> Found:
    """Run one arm in a process of its own and return what it printed."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `vllm_watch.py`
    }
    if peer is not None:
        environment[FOLDER_VARIABLE] = str(peer.absolute())
    command = [sys.executable, "-m", "benchmarks.vllm_arms", json.dumps({**plan, "arm": arm})]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=ARM_TIMEOUT_S, check=False
    )
    if ended.returncode:
        raise SystemExit(f"arm {arm} failed:\n{ended.stderr[-3000:]}")
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def medians(rounds: Sequence[dict[str, Found]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the median of all rounds' numbers by arm, size and kind."""
    numbers: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for found in rounds:
        for arm, sizes in found.items():
            for size, kinds in sizes.items():
                for kind, values in kinds.items():
                    numbers[arm, size, kind] += values
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (arm, size, kind), values in numbers.items():
        result.setdefault(arm, {}).setdefault(size, {})[kind] = round(statistics.median(values), 2)
    return result


def ratio(
    rounds: Sequence[dict[str, Found]], size: str, one: tuple[str, str], other: tuple[str, str]
) -> float:
    """Return the median over the rounds of `one`'s median over `other`'s; each is an arm and a kind."""
    ratios = []
    for found in rounds:
        pair = [statistics.median(found[arm][size][kind]) for arm, kind in (one, other)]
        ratios.append(pair[0] / pair[1])
    return round(statistics.median(ratios), 3)


def ratios(rounds: Sequence[dict[str, Found]]) -> dict[str, dict[str, float]]:
    """Return what the goals are about, by size."""
    compared = {
        "aggregated hit / example hit": (("aggregated", "hit"), ("example", "hit")),
        "aggregated hit / dynamo hit": (("aggregated", "hit"), ("dynamo", "hit")),
        "aggregated miss / vllm miss": (("aggregated", "miss"), ("vllm", "miss")),
        "aggregated miss / the same engine past us": (
            ("aggregated", "ours_beside_plain"),
            ("aggregated", "plain"),
        ),
        "aggregated misses_per_s / the same engine past us": (
            ("aggregated", "ours_beside_plain_per_s"),
            ("aggregated", "plain_per_s"),
        ),
        "aggregated misses_per_s / vllm misses_per_s": (
            ("aggregated", "misses_per_s"),
            ("vllm", "misses_per_s"),
        ),
        "aggregated hits_per_s / example hits_per_s": (
            ("aggregated", "hits_per_s"),
            ("example", "hits_per_s"),
        ),
        "disaggregated hit / text": (("disaggregated", "hit"), ("text", "hit")),
        "aggregated hit / vllm hit": (("aggregated", "hit"), ("vllm", "hit")),
    }
    there = rounds[0].keys()
    return {
        name: {size: ratio(rounds, size, one, other) for size in rounds[0][one[0]]}
        for name, (one, other) in compared.items()
        if {one[0], other[0]} <= there
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="folder with ai-dynamo 1.6.1; without it no arm `dynamo`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="images of each size in a round")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the model, for a small run")
    parser.add_argument("--out", type=Path, help="file for the result, besides standard output")
    given = parser.parse_args()
    arms = [arm for arm in given.arms if arm != "dynamo" or given.peer is not None]
    order, rounds = random.Random(1), []
    with tempfile.TemporaryDirectory() as folder:
        model = write_wide_model(Path(folder) / "model", hidden=given.hidden)
        for number in range(given.rounds):
            plan = {
                "model": str(model),
                "sizes": {size: SIZES[size] for size in given.sizes},
                "repeats": given.repeats,
                "seed": 1_000_000 * number,
            }
            found: dict[str, Found] = {}
            for arm in order.sample(arms, len(arms)):
                began = time.monotonic()
                with tempfile.TemporaryDirectory(prefix="bench-vllm-", dir="/dev/shm") as shared:
                    found[arm] = run_arm(arm, {**plan, "shared": shared}, given.peer)
                took = time.monotonic() - began
                say(f"round {number + 1} of {given.rounds}: {arm}, {took:.0f} s")
            rounds.append(found)
    finish(
        "vllm",
        {
            "columns": given.hidden * (1 + LEVELS),
            "rounds": given.rounds,
            "repeats": given.repeats,
            "median_ms_and_per_s": medians(rounds),
            "ratios": ratios(rounds),
        },
        given.out,
    )


if __name__ == "__main__":
    main()
