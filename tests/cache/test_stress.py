"""Five seconds of what `make soak` does for minutes."""

from __future__ import annotations

import secrets

import pytest

from tests.cache.stress import ALLOWED_GROWTH_MB, run_stress


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_threads_that_do_everything_at_once(policy: str) -> None:
    seed = secrets.randbits(31)
    print("seed", seed)
    report = run_stress(policy, seconds=2.5, threads=4, seed=seed)
    assert report.views_compared > 100
    for needed in ("get: hit", "lease: hit", "set: replaced", "commit", "abandon", "quarantine", "drop"):
        assert report.operations.get(needed, 0) > 0, report
    assert report.evictions > 0
    assert report.moves > 0
    assert report.growth_mb < ALLOWED_GROWTH_MB
