"""The picture of the dashboard shows what a real Prometheus answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.stack import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
BLUE, RED = (59, 125, 216), (200, 50, 60)

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs Debian's package prometheus"
)


def history() -> str:
    """Ten minutes of a PD worker: three hits a miss, and no encode worker."""
    labels = '{model="m",dynamo_component="pd",instance="pd"}'
    now = int(time.time())
    rows = {
        "dynamo_component_embedding_cache_hits_total": 3,
        "dynamo_component_embedding_cache_misses_total": 1,
        "trtllm_mm_cache_encode_workers": 0,
    }
    lines = [
        f"{name}{labels} {slope * second} {now - SECONDS + second}"
        for name, slope in rows.items()
        for second in range(0, SECONDS, 5)
    ]
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has this history."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "history").write_text(history())
    (folder / "prometheus.yml").write_text("")
    blocks = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "history", "data"]
    subprocess.run(blocks, cwd=folder, check=True, capture_output=True, timeout=60)
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], cwd=folder, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: serves(address), 30, (folder / "log").read_text())
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(30)


def serves(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def picture(url: str, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The picture: rows, columns, RGB."""
    path = tmp_path_factory.mktemp("picture") / "dashboard.png"
    command = [sys.executable, "tools/draw_dashboard.py", "--prometheus", url, "--minutes", "10", path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def where(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The rows, one a pixel, that have this colour or nearly."""
    return np.nonzero(np.abs(pixels - colour).sum(axis=2) < 30)[0]


def test_no_encode_worker_is_written_in_red(picture: np.ndarray) -> None:
    stats = picture[36:180]
    assert len(where(stats[:, 18 * 66 :], RED)) > 100
    assert len(where(stats[:, : 18 * 66], RED)) == 0


def test_a_line_is_at_the_height_of_its_value(picture: np.ndarray) -> None:
    """Three hits a miss: the line of the hit ratio is at 75 % of an axis that goes from 0 to 100 %."""
    top, height = 5 * 36, 8 * 36
    axes = picture[top + 36 : top + height - 50, 100 : 8 * 66 - 20]
    rows = where(axes, BLUE)
    assert len(rows) > 300
    assert np.median(rows) == pytest.approx(0.25 * len(axes), abs=3)
