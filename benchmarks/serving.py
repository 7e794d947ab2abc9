"""Time to first token and throughput of the whole stack, with the cache, without it, and ideally.

    python -m benchmarks.serving --aiperf .venv-aiperf/bin/aiperf [--reuse 0 50 80 95] [--window] [--rounds 2]

The stack that `launch/disagg_e_pd.sh` starts, driven by AIPerf. Data sets are drawn from fixed seeds:
`--requests` of one picture each over a pool whose size gives the reuse (80 %: the shape of the published
runs, 1,000 requests over 200 pictures), and `--window`, conversations that show the last 5 pictures in each
of 8 turns.
`serving_arms.py` says what the three arms are; they take turns, in another order each round.

share of the ideal = (off - on) / (off - ideal), of the mean time to first token and of the throughput;
at 0 % reuse there is nothing to gain, and `cost` says what having the cache costs: on / off - 1.

With `--out`, one JSON file for each data set. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.dataset import Request, pooled, reuse, sliding_window
from benchmarks.measuring import finish
from benchmarks.serving_arms import ARMS, ArmRun, Load, Stacks, stacks
from tools.tiny_models import make_tiny_model

GOAL_SHARE, GOAL_COST = 0.95, 0.01
PUBLISHED = {
    "requests": 1000,
    "pool at 80 %": 200,
    "text tokens": 400,
    "output tokens": 150,
    "concurrency": 64,
}
PUBLISHED_WINDOW = {"users": 30, "turns": 8, "window": 5, "width": 2400, "height": 1080, "concurrency": 30}
TURNS, WINDOW = 8, 5

Runs = dict[str, list[ArmRun]]


def measure(running: Stacks, load: Load, rounds: int, first: int, bar: tqdm[Any]) -> Runs:
    """Run the arms in turn. Without any reuse the ideal is `off`, and is left out."""
    arms = [arm for arm in ARMS if arm != "ideal" or reuse(load.requests) > 0]
    runs: Runs = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            bar.set_description(f"{reuse(load.requests):.0%} reuse, {arm}")
            runs[arm].append(running.run(arm, load, first + number))
            bar.update()
    return runs


def arm_summary(runs: Sequence[ArmRun], pictures: int) -> dict[str, Any]:
    """Summarise one arm: times over all requests of all rounds, rates and counts as means of the rounds."""
    ttft = [value for run in runs for value in run.load.ttft_ms.values()]
    p50, p90, p99 = np.percentile(ttft, [50, 90, 99])
    requests = len(runs[0].load.ttft_ms)
    return {
        "ttft_ms": {
            "avg": round(statistics.mean(ttft), 2),
            "p50": round(p50, 2),
            "p90": round(p90, 2),
            "p99": round(p99, 2),
        },
        "ttft_avg_ms_by_round": [round(_mean_ttft(run), 2) for run in runs],
        "requests_per_s": round(statistics.mean(run.load.requests_per_s for run in runs), 3),
        "requests_per_s_by_round": [round(run.load.requests_per_s, 3) for run in runs],
        "output_tokens_per_s": round(statistics.mean(run.load.output_tokens_per_s for run in runs), 2),
        "encodes": [run.encodes for run in runs],
        "hit_ratio": round(statistics.mean(run.hits / pictures for run in runs), 4),
        "cpu_ms_per_request": round(statistics.mean(1e3 * run.cpu_s / requests for run in runs), 2),
    }


def summary(runs: Runs, requests: Sequence[Request]) -> dict[str, Any]:
    """Summarise a data set: the arms, what the cache gained, and how much of what could be gained."""
    pictures = sum(len(request.pictures) for request in requests)
    arms = {arm: arm_summary(of_arm, pictures) for arm, of_arm in runs.items()}
    off, on = arms["off"], arms["on"]
    report: dict[str, Any] = {"reuse": round(reuse(requests), 4), "arms": arms, "change": _change(off, on)}
    if "ideal" in arms:
        ideal = arms["ideal"]
        report["share_of_ideal"] = {
            "ttft": _share(off["ttft_ms"]["avg"], on["ttft_ms"]["avg"], ideal["ttft_ms"]["avg"]),
            "throughput": _share(off["requests_per_s"], on["requests_per_s"], ideal["requests_per_s"]),
            "goal": GOAL_SHARE,
        }
        report["ttft_ms_by_kind"] = {
            arm: {
                kind: [
                    round(run.load.ttft_ms[number], 1)
                    for run in runs[arm]
                    for number, request in enumerate(requests)
                    if request.is_hit == (kind == "hit")
                ]
                for kind in ("hit", "miss")
            }
            for arm in runs
        }
    else:
        ratios = [_mean_ttft(b) / _mean_ttft(a) - 1 for a, b in zip(runs["off"], runs["on"], strict=True)]
        report["cost"] = {
            "ttft_by_round": [round(ratio, 4) for ratio in ratios],
            "ttft": round(statistics.mean(ratios), 4),
            "throughput": round(1 - on["requests_per_s"] / off["requests_per_s"], 4),
            "cpu": round(on["cpu_ms_per_request"] / off["cpu_ms_per_request"] - 1, 4),
            "goal": GOAL_COST,
        }
    return report


def _mean_ttft(run: ArmRun) -> float:
    return statistics.mean(run.load.ttft_ms.values())


def _change(off: dict[str, Any], on: dict[str, Any]) -> dict[str, float]:
    times = {name: round(on["ttft_ms"][name] / off["ttft_ms"][name] - 1, 4) for name in off["ttft_ms"]}
    return {**times, "throughput": round(on["requests_per_s"] / off["requests_per_s"] - 1, 4)}


def _share(off: float, on: float, ideal: float) -> float:
    return round((off - on) / (off - ideal), 4)


def table(name: str, report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table for the terminal."""
    yield f"{name}, reuse {report['reuse']:.1%}"
    yield f"{'':>7} {'avg':>8} {'p50':>8} {'p90':>8} {'p99':>8}  ms  {'req/s':>7} {'encodes':>8} {'hits':>7}"
    for arm, row in report["arms"].items():
        times = " ".join(f"{row['ttft_ms'][key]:8.1f}" for key in ("avg", "p50", "p90", "p99"))
        encodes = statistics.mean(row["encodes"])
        yield f"{arm:>7} {times}      {row['requests_per_s']:7.2f} {encodes:8.0f} {row['hit_ratio']:7.1%}"
    for key in ("share_of_ideal", "cost"):
        if key in report:
            yield f"   {key}: {report[key]}"


def loads(options: argparse.Namespace) -> Iterator[tuple[str, Load]]:
    """Yield the data sets that the command line asks for, by name."""
    tail = (options.concurrency, options.output_tokens)
    for percent in options.reuse:
        pool = round(options.requests * (1 - percent / 100))
        requests = pooled(options.requests, pool, options.words)
        yield f"reuse-{percent}", Load(requests, options.pixels, options.pixels, *tail)
    if options.window:
        # The published pictures are 2400 x 1080: as wide for their height, with half the usual pixels.
        width, height = round(options.pixels * 1.054 / 28) * 28, round(options.pixels * 0.474 / 28) * 28
        yield (
            "window",
            Load(sliding_window(options.users, TURNS, WINDOW, options.words), width, height, *tail),
        )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--aiperf", type=Path, required=True, help="AIPerf's executable")
    parser.add_argument("--model", type=Path, help="model directory [a small Qwen2-VL with random weights]")
    parser.add_argument("--reuse", type=int, nargs="*", default=[0, 50, 80, 95], help="percent")
    parser.add_argument("--window", action="store_true", help="the sliding window too")
    parser.add_argument("--users", type=int, default=6, help="of the sliding window")
    parser.add_argument("--requests", type=int, default=100, help="of each reuse")
    parser.add_argument("--concurrency", type=int, default=4, help="requests under way at a time")
    parser.add_argument("--pixels", type=int, default=336, help="width and height of a picture")
    parser.add_argument("--words", type=int, default=40, help="of text in a request")
    parser.add_argument("--output-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to keep the results")
    return parser.parse_args()


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    sets = dict(loads(options))
    scale = {
        key: getattr(options, key)
        for key in ("requests", "concurrency", "pixels", "words", "output_tokens", "rounds", "users")
    }
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or make_tiny_model("qwen2_vl", Path(scratch) / "cpu-demo")
        total = options.rounds * sum(2 + (reuse(load.requests) > 0) for load in sets.values())
        with stacks(model, options.aiperf.absolute(), Path(scratch)) as running, tqdm(total=total) as bar:
            for number, (name, load) in enumerate(sets.items()):
                runs = measure(running, load, options.rounds, number * options.rounds, bar)
                report = summary(runs, load.requests)
                bar.write("\n".join(table(name, report)))
                published = PUBLISHED_WINDOW if name == "window" else PUBLISHED
                facts = {
                    "model": f"{model.name} (tools/make_tiny_model.py)" if not options.model else model.name,
                    "aiperf": runs["on"][0].load.version,
                    "this_run": {**scale, "width": load.width, "height": load.height},
                    "published_runs": published,
                }
                out = options.out / f"{name}.json" if options.out else None
                finish("serving", {"data_set": name, **facts, **report}, out)


if __name__ == "__main__":
    main()
