"""The short version of the soak: that it runs, and that it would notice what it is for."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from tests.soak.run import MB, Soak, run_soak


def test_mixed_requests_are_answered_and_nothing_is_left(tmp_path: Path) -> None:
    """Too short for a verdict on memory: everything is warming up."""
    seed = random.SystemRandom().randrange(2**31)
    soak = run_soak(tmp_path, seconds=6, seed=seed, clients=2)
    print(soak.table())
    assert soak.problems(bound_mb=1e6) == [], f"seed {seed}"
    assert {kind for name, kind in soak.memory if name.startswith("PD")} == {
        "anonymous",
        "heap_used",
        "heap_free",
    }
    assert all(min(series) > 0 for series in soak.memory.values())


def soaked(anonymous: list[float], free: list[float]) -> Soak:
    memory = {("PD-1", "anonymous"): anonymous, ("PD-1", "heap_free"): free}
    return Soak(1.0, Counter({("question", "200"): 1}), [], {}, {}, memory)


def test_growth_after_the_warm_up_is_a_problem_and_growth_in_it_is_none() -> None:
    flat = [100.0 * MB] * 60
    warming = [float(MB * min(100, 5 * n)) for n in range(60)]
    leaking = [float(MB * (100 + 2 * n)) for n in range(60)]
    spike = [100.0 * MB] * 59 + [900.0 * MB]
    assert soaked(flat, leaking).problems(32) == [], "what the allocator has free shows in anonymous memory"
    assert soaked(warming, flat).problems(32) == []
    assert soaked(spike, flat).problems(32) == []
    (problem,) = soaked(leaking, flat).problems(32)
    assert problem.startswith("PD-1: anonymous memory grew by 6")
