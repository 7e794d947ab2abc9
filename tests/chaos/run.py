"""Chaos: requests with known answers, while workers are killed, frozen and restarted at random.

    python -m tests.chaos.run --seconds 300

One frontend, two PD workers and three encode workers with small caches. Prints its seed and, at the end, a
table; fails when an answer was wrong, a request failed in a way that docs/failure-modes.md does not list, a
lease or extent was lost, or the accounting of a cache is inconsistent. `make chaos` runs it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from tests.chaos.load import Load
from tests.chaos.memory import Memory
from tests.chaos.questions import make_questions
from tests.chaos.report import Report, end, left_over
from tests.chaos.stack import chaos_stack, wait_until_serving
from tests.chaos.supervisor import Supervisor
from tests.chaos.tiers import chaos_tiers

_STEP_S = 0.05
_REPAIR_DEADLINE_S = 60.0


def run_chaos(
    folder: Path,
    *,
    seconds: float,
    seed: int,
    pd_workers: int = 2,
    encode_workers: int = 3,
    clients: int = 4,
    pause_s: float = 2.0,
    ucx_tls: str | None = None,
    chunk_bytes: int | None = None,
    with_tiers: bool = False,
) -> Report:
    """Disturb a new stack for `seconds`, let everything recover, stop it in order; return what happened.

    `pause_s` is the mean time between two faults. With `chunk_bytes` all embeddings come by NIXL, in such
    chunks. Logs stay in `folder`.
    """
    rng = random.Random(seed)
    with ExitStack() as running:
        tiers = running.enter_context(chaos_tiers(folder, rng, pause_s)) if with_tiers else None
        pd = (*(tiers.options if tiers else ()), *(("--transfer", "nixl") if chunk_bytes else ()))
        stack = running.enter_context(
            chaos_stack(folder, pd_workers, encode_workers, ucx_tls, chunk_bytes, pd=pd)
        )
        questions = make_questions(rng, scenes=12, questions=20)
        wait_until_serving(stack)
        load = Load(stack.url, questions, clients=clients, seed=seed)
        supervisor = Supervisor(stack, rng, load.probe, pause_s)
        memory = Memory((stack.frontend, *stack.workers))
        began = time.monotonic()
        try:
            while time.monotonic() < began + seconds:
                supervisor.step(disturb=True)
                memory.look()
                if tiers:
                    tiers.step()
                time.sleep(_STEP_S)
            if tiers:
                tiers.end()
            deadline = time.monotonic() + _REPAIR_DEADLINE_S
            while not supervisor.all_serve and time.monotonic() < deadline:
                supervisor.step(disturb=False)
                time.sleep(_STEP_S)
        finally:
            load.close()
        lasted = time.monotonic() - began
        everything_serves = supervisor.all_serve
        left = left_over(stack.workers)
        endings = end(stack.workers)
    return Report(
        seed=seed,
        seconds=lasted,
        outcomes=load.outcomes,
        record=supervisor.record,
        everything_serves=everything_serves,
        left_over=left,
        endings=endings,
        memory=memory,
        tier_faults=tiers.faults if tiers else Counter(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill, freeze and restart workers under load; see the file.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--ucx-tls", help="transports that UCX may use; tcp is what runs between hosts")
    parser.add_argument("--chunk-bytes", type=int, help="READ all by NIXL, in such chunks; an item has 2304")
    parser.add_argument("--pause-s", type=float, default=2.0, help="mean time between two faults")
    parser.add_argument("--tiers", action="store_true", help="with a disk and a store, disturbed too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {arguments.seed}, logs in {folder}", file=sys.stderr, flush=True)
    report = run_chaos(
        folder,
        seconds=arguments.seconds,
        seed=arguments.seed,
        pause_s=arguments.pause_s,
        ucx_tls=arguments.ucx_tls,
        chunk_bytes=arguments.chunk_bytes,
        with_tiers=arguments.tiers,
    )
    print(report.table())
    problems = report.problems()
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
