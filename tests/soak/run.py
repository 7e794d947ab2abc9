"""Soak: hours of mixed requests against the real stack, and what its processes hold of memory meanwhile.

    python -m tests.soak.run --seconds 3600

One frontend, one PD worker and one encode worker with small caches. Prints each process's anonymous memory
every few seconds as CSV on standard error and, at the end, a table; fails when an answer was wrong, when a
worker holds something of a request that has ended, or when the anonymous memory of a process or what its
allocator has in use has grown by more than `--bound-mb` after the warm-up. `make soak-serving` runs it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import openai
import torch

from tests.chaos.questions import make_questions
from tests.chaos.report import IN_ORDER, end, left_over
from tests.chaos.stack import chaos_stack, wait_until_serving
from tests.services import Service
from tests.soak.load import MixedLoad

MB = 1024**2
BOUND_MB = 32.0
"""Growth after the warm-up that is noise: one large image in several copies, a thread's arena."""
_EVERY_S = 5.0
_WARM_UP = 1 / 3
"""Share of the run in which caches, thread pools and heaps take the size that they have under this load."""
_SHARE = 1 / 5
"""The growth is from the median of this share after the warm-up to that of the last."""


@dataclass
class Soak:
    """Memory over time, in bytes by process and kind, and what came of the requests."""

    seconds: float
    outcomes: Counter[tuple[str, str]]
    wrong: list[str]
    left_over: dict[str, dict[str, float]]
    endings: dict[str, str]
    memory: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def growth(self, series: Sequence[float]) -> float:
        """Return by how much the median at the end is above that after the warm-up, in bytes."""
        settled = series[int(len(series) * _WARM_UP) :]
        part = max(1, int(len(settled) * _SHARE))
        return statistics.median(settled[-part:]) - statistics.median(settled[:part])

    def problems(self, bound_mb: float) -> list[str]:
        """Say what was not as promised; empty if all was."""
        found = [f"wrong answer: {wrong}" for wrong in self.wrong]
        found += [f"{name} still holds {held}" for name, held in self.left_over.items()]
        found += [f"{name}: {said}" for name, said in self.endings.items() if said != IN_ORDER]
        found += [
            f"{name}: {kind} memory grew by {self.growth(series) / MB:.0f} MB, more than {bound_mb:g}"
            for (name, kind), series in self.memory.items()
            if kind != "heap_free" and self.growth(series) > bound_mb * MB
        ]
        if not any(status == "200" for _, status in self.outcomes):
            found.append("not one request was answered")
        return found

    def table(self) -> str:
        """Return the report as Markdown tables."""
        lines = [
            f"{self.outcomes.total()} requests in {self.seconds:.0f} s",
            "",
            "| request | came to | times |",
        ]
        lines += ["|---|---|---|"]
        lines += [f"| {kind} | {came} | {count} |" for (kind, came), count in sorted(self.outcomes.items())]
        lines += ["", "| MB | start | after warm-up | end | highest | growth |", "|---|---|---|---|---|---|"]
        for (name, kind), series in self.memory.items():
            figures = (series[0], series[int(len(series) * _WARM_UP)], series[-1], max(series))
            columns = " | ".join(f"{figure / MB:.0f}" for figure in figures)
            lines.append(f"| {name} {kind} | {columns} | {self.growth(series) / MB:+.1f} |")
        return "\n".join(lines)


def run_soak(folder: Path, *, seconds: float, seed: int, clients: int = 4) -> Soak:
    """Load a new stack for `seconds`, stop it in order, and return what was seen. Logs stay in `folder`."""
    rng = random.Random(seed)
    memory: dict[tuple[str, str], list[float]] = {}
    with chaos_stack(folder, 1, 1, None) as stack:
        questions = make_questions(rng, scenes=12, questions=20)
        wait_until_serving(stack)
        with openai.OpenAI(base_url=stack.url, api_key="none") as client:
            model = client.models.list().data[0].id
        load = MixedLoad(stack.url, model, questions, clients=clients, seed=seed)
        began = time.monotonic()
        try:
            while time.monotonic() < began + seconds:
                time.sleep(_EVERY_S)
                _look((stack.frontend, *stack.workers), memory)
                _print(time.monotonic() - began, load.requests, memory)
        finally:
            load.close()
        left = left_over(stack.workers)
        endings = end(stack.workers)
    return Soak(time.monotonic() - began, load.outcomes, load.wrong, left, endings, memory)


def _look(services: Sequence[Service], memory: dict[tuple[str, str], list[float]]) -> None:
    for service in services:
        found = {"anonymous": float(service.anonymous_bytes)}
        if service.system_port:
            name = "trtllm_mm_cache_memory_bytes"
            kinds = ("heap_used", "heap_free")
            found |= {kind: service.process.metric(name, kind=kind) for kind in kinds}
        for kind, nbytes in found.items():
            memory.setdefault((service.name, kind), []).append(nbytes)


def _print(seconds: float, requests: int, memory: dict[tuple[str, str], list[float]]) -> None:
    if len(next(iter(memory.values()))) == 1:
        print("seconds,requests", *(f"{name} {kind}" for name, kind in memory), sep=",", file=sys.stderr)
    figures = (f"{series[-1] / MB:.1f}" for series in memory.values())
    print(f"{seconds:.0f}", requests, *figures, sep=",", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Mixed requests for long, and memory meanwhile; see the file."
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--bound-mb", type=float, default=BOUND_MB)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {arguments.seed}, logs in {folder}", file=sys.stderr, flush=True)
    soak = run_soak(folder, seconds=arguments.seconds, seed=arguments.seed, clients=arguments.clients)
    print(soak.table())
    problems = soak.problems(arguments.bound_mb)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
