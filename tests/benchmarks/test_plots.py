"""The plots are drawn from the results that are kept, and every one of them is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from benchmarks.plots import PLOTS, RESULTS, draw


def test_every_plot_is_drawn_from_the_kept_results(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    drawn = draw(folder)
    assert [path.stem for path in drawn] == list(PLOTS)
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.width > 600
        assert (RESULTS / path.name).exists(), f"python -m benchmarks.plots draws {path.name}"


def test_a_result_that_is_not_there_leaves_its_plot_out(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "hit_ratio.json", tmp_path)
    assert [path.name for path in draw(tmp_path)] == ["hit_ratio_by_capacity.png"]
