"""What `serving.py` makes of its runs, by numbers that can be checked in one's head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.aiperf import LoadRun, read_export
from benchmarks.dataset import pooled
from benchmarks.serving import summary
from benchmarks.serving_arms import ArmRun

REQUESTS = pooled(4, 2, words=1)  # two pictures, each shown twice


def run_of(hit_ms: float, miss_ms: float, *, encodes: int, hits: int, cpu_s: float = 1.0) -> ArmRun:
    times = {n: hit_ms if request.is_hit else miss_ms for n, request in enumerate(REQUESTS)}
    load = LoadRun(times, requests_per_s=1000 / (hit_ms + miss_ms), output_tokens_per_s=1.0, version="0")
    return ArmRun(load, encodes, hits, 4 - hits, cpu_s)


def test_the_share_of_the_ideal_is_what_was_saved_of_what_could_be() -> None:
    runs = {
        "off": [run_of(100, 100, encodes=4, hits=0)],
        "on": [run_of(30, 110, encodes=2, hits=2)],
        "ideal": [run_of(20, 100, encodes=2, hits=0)],
    }
    report = summary(runs, REQUESTS)
    assert report["reuse"] == 0.5
    assert report["share_of_ideal"]["ttft"] == pytest.approx((100 - 70) / (100 - 60))
    assert report["arms"]["on"]["encodes"] == [2]
    assert report["arms"]["on"]["hit_ratio"] == 0.5
    assert report["ttft_ms_by_kind"]["on"] == {"hit": [30, 30], "miss": [110, 110]}
    assert report["change"]["avg"] == pytest.approx(-0.3)


def test_without_reuse_the_cost_is_taken_round_by_round() -> None:
    off = [run_of(100, 100, encodes=4, hits=0), run_of(200, 200, encodes=4, hits=0)]
    on = [run_of(101, 101, encodes=4, hits=0), run_of(206, 206, encodes=4, hits=0, cpu_s=1.1)]
    cost = summary({"off": off, "on": on}, REQUESTS)["cost"]
    assert cost["ttft_by_round"] == [0.01, 0.03]
    assert cost["ttft"] == pytest.approx(0.02)
    assert cost["cpu"] == pytest.approx(0.05)


def test_aiperfs_export_is_read_by_place(tmp_path: Path) -> None:
    """The two files as AIPerf 0.13 leaves them, without the fields that are not read."""
    rows = [
        {"metadata": {"session_num": number}, "metrics": metrics}
        for number, metrics in enumerate(
            [{"time_to_first_token": {"value": 12.5, "unit": "ms"}}, {"error": {"value": 1}}]
        )
    ]
    (tmp_path / "profile_export.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "profile_export_aiperf.json").write_text(
        json.dumps(
            {
                "request_throughput": {"avg": 8.0, "unit": "requests/sec"},
                "output_token_throughput": {"avg": 99.0, "unit": "tokens/sec"},
                "aiperf_version": "0.13.0",
            }
        )
    )
    assert read_export(tmp_path) == LoadRun({0: 12.5}, 8.0, 99.0, "0.13.0")
