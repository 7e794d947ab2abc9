"""Every benchmark still measures what it says, on a run too small for its times to mean anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conftest import SmallRun


def test_copy_and_hand_off_compare_every_size(small_run: SmallRun) -> None:
    copy = small_run("cache_copy", "--repeats", 1)
    handoff = small_run("cache_handoff", "--repeats", 1)
    assert list(copy["sizes"]) == ["1 MB", "10 MB", "34 MB"]
    assert all(row["write_to_memcpy"] > 0 for row in copy["sizes"].values())
    assert all(
        row["make_ms"].keys() >= {"arena handle", "ordinary tensor"} for row in handoff["sizes"].values()
    )


def test_key_is_computed_over_the_pictures_bytes(small_run: SmallRun) -> None:
    report = small_run("cache_key", "--repeats", 1)
    assert report["jpeg_bytes"] > 280 * 1024
    assert report["key_to_url_text"] > 0


def test_operations_are_timed_at_both_counts(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cache_operations.COUNTS", (200, 300))
    report = small_run("cache_operations", "--rounds", 2)
    assert {f"{policy} {count}" for policy in ("lru", "s3fifo") for count in (200, 300)} <= set(
        report["median_us"]
    )
    assert report["median_us"]["lru 200"].keys() == {"get", "lease", "set", "reserve+commit"}


def test_utilization_is_that_of_a_cache_that_evicts(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.cache_utilization.ENTRIES", 200)
    report = small_run("cache_utilization", "--requests", 6_000)
    for mix in report["mixes"].values():
        assert mix["entries"] > 0
        assert mix["hit_percent"] <= 100
        assert 0 < mix["utilisation_least"] <= mix["utilisation_mean"] <= 1


def test_hit_ratio_grows_with_the_capacity_up_to_that_of_no_limit(small_run: SmallRun) -> None:
    report = small_run("hit_ratio", "--requests", 1_000)
    for traffic in report["traffic"].values():
        for ratios in traffic["hit_ratio"].values():
            assert ratios[0] < ratios[-1] <= traffic["best"]


def test_transfers_bring_embeddings_of_every_size(small_run: SmallRun, tmp_path: Path) -> None:
    out = tmp_path / "transfer.json"
    report = small_run("transfer", "--rounds", 1, "--repeats", 2, "--out", out)
    assert out.exists()
    assert list(report["sizes"]) == ["1 MB", "10 MB", "34 MB"]
    for row in report["sizes"].values():
        ours = row["ways"]["ours"]
        assert 0 < ours["committed_ms"] < ours["whole_ms"]
        assert row["memcpy_ms"] > 0
