"""What page-locking costs a process that has no other use for a CUDA context."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil

ARENA_BYTES = 2 * 1024**3


def child(lock: bool) -> None:
    """Make an arena, lock it or not, say what it took, and wait."""
    from trtllm_mm_cache.cache.arena.arena import Arena

    arena = Arena(ARENA_BYTES)
    resident = psutil.Process().memory_info()
    before = resident.rss - resident.shared
    began = time.perf_counter()
    if lock:
        arena.page_lock()
    seconds = time.perf_counter() - began
    resident = psutil.Process().memory_info()
    after = resident.rss - resident.shared
    grown = round((after - before) / 1e6)
    print(json.dumps({"page_lock_s": round(seconds, 3), "process_mb": grown}), flush=True)
    sys.stdin.read()


def gpu_used() -> int:
    """Return the bytes of the GPU's memory that are taken, by all processes."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    """Print what a process with a page-locked arena costs more than one without."""
    if sys.argv[1:]:
        child(sys.argv[1] == "lock")
        return
    for what in ("none", "lock"):
        before = gpu_used()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.context", what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        line = json.loads(process.stdout.readline())
        line |= {"arena": what, "arena_mb": ARENA_BYTES // 1024**2}
        line["gpu_mb"] = round((gpu_used() - before) / 1e6)
        process.stdin.close()
        process.wait(timeout=30)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
