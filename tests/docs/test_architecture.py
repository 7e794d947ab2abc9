"""The walk of docs/architecture.md: eight steps, one file each, and its tree of folders."""

from __future__ import annotations

import re

from tests.docs.documents import ROOT, tracked_paths


def test_each_of_the_eight_steps_names_one_file_of_the_package() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \w+ \| `([^`|]+)` \|", page, flags=re.MULTILINE)
    assert [int(step) for step, _ in rows] == [*range(1, 9)]
    assert {ROOT / "trtllm_mm_cache" / path for _, path in rows} <= {ROOT / each for each in tracked_paths()}
    assert len({path for _, path in rows}) == len(rows)


def test_every_folder_of_the_package_is_in_the_tree() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    parts = [path.parts for path in tracked_paths() if path.parts[:1] == ("trtllm_mm_cache",)]
    folders = {each[1] for each in parts if len(each) > 2}
    assert folders == set(re.findall(r"^\| `trtllm_mm_cache/(\w+)/` \|", page, flags=re.MULTILINE))
