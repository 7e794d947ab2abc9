"""The short version of the chaos run: no clock is held to anything but the deadlines of the run itself."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.chaos.run import run_chaos


def test_nothing_is_lost_and_no_answer_is_wrong_while_workers_die_and_freeze(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    report = run_chaos(tmp_path, seconds=2, seed=seed, encode_workers=2, clients=3, pause_s=1.2)
    print(report.table())
    assert report.problems() == [], f"seed {seed}"
    assert report.record.faults


def test_nor_by_nixl_in_chunks_with_a_disk_and_a_store_that_are_disturbed_too(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="the store's client is not installed: the extra `store`")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    seed = random.SystemRandom().randrange(2**31)
    report = run_chaos(
        tmp_path,
        seconds=2,
        seed=seed,
        encode_workers=2,
        clients=3,
        pause_s=0.6,
        chunk_bytes=64,
        with_tiers=True,
    )
    print(report.table())
    assert report.problems() == [], f"seed {seed}"
    assert report.tier_faults
