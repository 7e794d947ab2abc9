"""The benchmark runs, small, and measures what it says; its times mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang.models import ROOT


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_way_is_measured_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "sglang.json"
    line = f"--repeats 1 --hidden 256 --out {out} --sizes".split()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.sglang", *line, "448 px"], cwd=ROOT, check=True, timeout=850
    )
    report = json.loads(out.read_text())
    (size,) = report["first_token"].values()
    ways = {"miss", "hit", "sglang's miss", "sglang's hit", "text"}
    assert size["median_ms"].keys() == ways
    assert all(value > 0 for value in [*size["median_ms"].values(), *size["ratios"].values()])
    assert "hit / sglang's hit" in size["ratios"]
    assert report["handoff"].keys() == {"1 MB", "10 MB", "34 MB"}
    assert all(handed[way]["make"] > 0 for handed in report["handoff"].values() for way in ("place", "copy"))
