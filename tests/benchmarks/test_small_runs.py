"""Every benchmark runs, small, and measures what it says; its times mean nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conftest import SmallRun


@pytest.mark.parametrize("name", ["cache_copy", "cache_handoff", "cache_key"])
def test_it_runs(small_run: SmallRun, name: str) -> None:
    small_run(name, "--repeats", 1)


def test_operations_are_timed_for_both_policies(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cache_operations.COUNTS", (200, 300))
    assert {"lru 200", "s3fifo 300"} <= small_run("cache_operations", "--rounds", 2)["median_us"].keys()


def test_utilization_is_that_of_a_cache_that_evicts(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.cache_utilization.ENTRIES", 200)
    report = small_run("cache_utilization", "--requests", 6_000)
    for mix in report["mixes"].values():
        assert mix["hit_percent"] < 100
        assert 0.5 < mix["utilisation_least"] <= mix["utilisation_mean"] <= 1


def test_hit_ratio_grows_with_the_capacity_up_to_that_of_no_limit(small_run: SmallRun) -> None:
    report = small_run("hit_ratio", "--requests", 1_000)
    for traffic in report["traffic"].values():
        for ratios in traffic["hit_ratio"].values():
            assert ratios[0] < ratios[-1] <= traffic["best"]


def test_transfers_bring_embeddings_of_every_size(small_run: SmallRun, tmp_path: Path) -> None:
    """The receiver raises where bytes are missing; what is committed is a part of the whole way."""
    out = tmp_path / "transfer.json"
    ways = "ours,ours_tcp,ours_tcp_unchecked"
    report = small_run("transfer", "--rounds", 1, "--repeats", 2, "--ways", ways, "--out", out)
    assert out.exists()
    for row in report["sizes"].values():
        assert row["ways"]["ours"]["committed_ms"] < row["ways"]["ours"]["whole_ms"]
        assert len(row["goals"]) == 2


def test_every_token_of_an_answer_is_counted(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark itself refuses an answer of another number of tokens."""
    monkeypatch.setattr("benchmarks.token_cost.TOKENS", 20)
    assert small_run("token_cost", "--rounds", 2)["rounds"] == 2


def test_both_frontends_stream_every_token(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that breaks off is an error of the benchmark's own."""
    monkeypatch.setattr("benchmarks.frontend.CONCURRENCY", (2,))
    report = small_run("frontend", "--rounds", 1, "--tokens", 4)
    assert report["2"]["tokens_s"].keys() == {"ours", "dynamo", "ratio"}


def test_items_that_come_again_are_found_whichever_pd_worker_there_is(small_run: SmallRun) -> None:
    report = small_run("routing", "--workers", 2, "--images", 4, "--requests", 12)
    ours, dynamo = report["2"]["ours"], report["2"]["dynamo"]
    assert ours["misses"] == ours["entries"] <= 4 < dynamo["entries"]
