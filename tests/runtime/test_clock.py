"""Files of discovery when the system's clock is set, as a process under libfaketime sees it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.stack import REPOSITORY, wait_until
from tests.redteam.test_clock import LIBRARY, Clock
from tests.services import WITH_US

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (apt-get install faketime)")

WATCHER = """
import sys, time, pathlib
from trtllm_mm_cache.runtime.clock import watch_clock
watch_clock(pathlib.Path(sys.argv[1]))
print("watches", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_all_files_are_as_new_as_the_clock_says(tmp_path: Path, step_s: int) -> None:
    clock, folder = Clock(tmp_path), tmp_path / "discovery"
    (folder / "v1").mkdir(parents=True)
    files = [folder / name for name in ("secret", "v1/worker", "v1/another")]
    for file in files:
        file.touch()
        os.utime(file, (0, time.time() - 5))
    watcher = subprocess.Popen(
        [*WITH_US, sys.executable, "-c", WATCHER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **clock.variables()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == b"watches\n"
        clock.set(step_s)

        def renewed() -> bool:
            return all(abs(file.stat().st_mtime - time.time() - step_s) < 60 for file in files)

        wait_until(renewed, 30, "the files were not renewed")
        watcher.kill()
