"""What an engine's processes leave when all are killed at once: the next start removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_mm_cache.cache.arena import leftovers
from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT, remove_leftovers
from trtllm_mm_cache.engines.left_files import remove_files

# Apart from the registers of every other test's processes, which start and end at the same time.
PREFIX = f"trtllm_mm_cache_test_{os.getpid()}."

WORKER = f"""
import multiprocessing, socket, sys, tempfile, time
from pathlib import Path
from multiprocessing.shared_memory import SharedMemory
from trtllm_mm_cache.cache.arena import leftovers
from trtllm_mm_cache.engines.left_files import files_made, write_down

def listening():
    made = socket.socket(socket.AF_UNIX)
    made.bind(tempfile.mktemp())
    made.listen()
    return made

def run_engine(pipe):
    memory, made = SharedMemory(create=True, size=1 << 20), listening()
    memory.buf[0] = 1
    pipe.send([f"/dev/shm/{{memory.name}}", made.getsockname()])
    pipe.recv()
    memory.close()
    memory.unlink()

if __name__ == "__main__":
    leftovers._PREFIX = {PREFIX!r}
    before_engine = listening()
    before = files_made()
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=run_engine, args=(theirs,), daemon=True).start()
    made = listening()
    files = [*ours.recv(), made.getsockname()]
    assert files_made() - before == set(map(Path, files)), files_made()
    if sys.argv[1] == "written down":
        write_down(files_made() - before)
    print(*files, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_PREFIX", PREFIX)


@pytest.mark.parametrize("written_down", [True, False])
def test_the_next_start_removes_sockets_and_shared_memory_that_a_killed_worker_wrote_down(
    written_down: bool, tmp_path: Path
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    worker = subprocess.Popen(
        [sys.executable, script, "written down" if written_down else "not"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    files: list[Path] = []
    try:
        assert worker.stdout is not None
        files = [Path(name) for name in worker.stdout.readline().split()]
        assert [file.exists() for file in files] == [True, True, True]
        assert remove_leftovers() == 0, "its process lives"
    finally:
        os.killpg(worker.pid, signal.SIGKILL)  # as `serve` does it: Python's resource tracker with the others
        worker.communicate(timeout=30)
    assert [file.exists() for file in files] == [True, True, True]
    assert remove_leftovers() == (4096 if written_down else 0), (
        "the memory is sparse: one page was written to"
    )
    assert [file.exists() for file in files] == 3 * [not written_down]
    remove_files(files)
    assert [file.exists() for file in files] == [False, False, False]
    assert not list(SHARED_MEMORY_ROOT.glob(f"{PREFIX}*"))
