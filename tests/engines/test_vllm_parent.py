"""A process that vLLM starts ends with its parent, even when that is killed; needs no vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.e2e.stack import REPOSITORY

PARENT = """
import multiprocessing, os, time
from trtllm_mm_cache.engines.vllm.parent import end_with_parent

def child(ready):
    end_with_parent()
    ready.send(os.getpid())
    time.sleep(300)

if __name__ == "__main__":
    end_with_parent()  # of the main process: nothing
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    context.Process(target=child, args=(theirs,)).start()
    print(mine.recv(), flush=True)
    time.sleep(300)
"""


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(REPOSITORY)}
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
        gone, alive = psutil.wait_procs([child], timeout=60)
        for each in alive:
            each.kill()
    assert gone
