"""The benchmark runs, small, and measures what it says; its times mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.models import ROOT

ARMS = ("vllm", "example", "aggregated", "disaggregated", "text")
KINDS = {"miss", "hit", "misses_per_s", "hits_per_s"}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_arm_answers_misses_and_hits(tmp_path: Path) -> None:
    """Without Dynamo's, whose wheel the tests do not have."""
    out = tmp_path / "vllm.json"
    line = f"--rounds 1 --repeats 1 --hidden 256 --out {out} --sizes".split()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm", *line, "1 MB", "--arms", *ARMS],
        cwd=ROOT,
        check=True,
        timeout=1750,
    )
    report = json.loads(out.read_text())
    medians = report["median_ms_and_per_s"]
    assert medians.keys() == set(ARMS)
    assert all(medians[arm]["1 MB"].keys() >= KINDS for arm in ARMS if arm != "text")
    beside = {"plain", "plain_per_s", "ours_beside_plain", "ours_beside_plain_per_s"}
    assert medians["aggregated"]["1 MB"].keys() == KINDS | beside
    assert all(value > 0 for arm in medians.values() for kinds in arm.values() for value in kinds.values())
    assert "aggregated hit / example hit" in report["ratios"]
    assert "disaggregated hit / text" in report["ratios"]
