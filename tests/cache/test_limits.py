"""Arenas are compared with /dev/shm, control groups and RAM before anything is committed."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from trtllm_mm_cache.cache.arena.limits import cgroup_rooms, check_fits
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import GB, MB


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_what_fits_passes() -> None:
    check_fits({"--one": 1 * MB, "--two": 2 * MB})


def test_what_does_not_fit_is_refused_with_every_figure_and_nothing_is_taken() -> None:
    before = os.statvfs("/dev/shm").f_bavail  # noqa: S108 - the file system, not a file
    too_much = psutil.virtual_memory().total + GB
    with pytest.raises(ConfigurationError) as refused:
        check_fits({"--cache": too_much, "--transit": GB, "--nothing": 0})
    text = str(refused.value)
    assert f"the arenas need {(too_much + GB) / GB:.2f} GB" in text
    assert f"({too_much / GB:.2f} GB by --cache, 1.00 GB by --transit)" in text
    assert "are free of" in text
    assert "lower one of these settings, or" in text
    assert os.statvfs("/dev/shm").f_bavail > before - GB // 4096  # noqa: S108


def test_the_sum_counts_not_each_alone() -> None:
    half = psutil.virtual_memory().total * 6 // 10
    with pytest.raises(ConfigurationError, match="the arenas need"):
        check_fits({"--cache": half, "--other": half})


def test_version_2_counts_every_level_and_gives_cached_files_back(tmp_path: Path) -> None:
    """The files and their form are those of the kernel's Documentation/admin-guide/cgroup-v2.rst."""
    group(tmp_path / "pod", {"memory.max": 3 * GB, "memory.current": GB, "memory.stat": "anon 5\nfile 7"})
    statistics = f"anon 1\nactive_file {100 * MB}\ninactive_file {200 * MB}\nshmem 3"
    group(
        tmp_path / "pod/container",
        {"memory.max": "max", "memory.current": 500 * MB, "memory.stat": statistics},
    )
    group(
        tmp_path / "pod/container/service",
        {"memory.max": 400 * MB, "memory.current": 500 * MB, "memory.stat": statistics},
    )
    assert list(cgroup_rooms(tmp_path, "0::/pod/container/service\n")) == [
        (200 * MB, "/pod/container/service"),
        (2 * GB, "/pod"),
    ]


def test_version_1_is_read_too(tmp_path: Path) -> None:
    names = {"memory.limit_in_bytes": GB, "memory.usage_in_bytes": 2 * GB}
    group(tmp_path / "memory/docker/0123", {**names, "memory.stat": "cache 5\ntotal_inactive_file 7"})
    membership = "9:name=systemd:/docker/0123\n4:cpu,memory:/docker/0123\n0::/\n"
    assert list(cgroup_rooms(tmp_path, membership)) == [(0, "/docker/0123")]


def test_a_container_that_sees_its_own_group_as_the_root_is_held_to_it(tmp_path: Path) -> None:
    names = {"memory.limit_in_bytes": GB, "memory.usage_in_bytes": MB, "memory.stat": "cache 5"}
    group(tmp_path / "memory", names)
    assert list(cgroup_rooms(tmp_path, "4:memory:/docker/0123\n")) == [(GB - MB, "/")]


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert list(cgroup_rooms(tmp_path, "0::/\n")) == []
