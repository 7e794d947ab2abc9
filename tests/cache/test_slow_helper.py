"""torch's shared-memory helper answers late: what asks it waits, and gets its memory all the same."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.cache_handoff import DTYPE, WIDTH, OtherProcess
from trtllm_mm_cache.cache.arena import region
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.region import open_shared_storage
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import SharedMemoryError

LATE_S = 2.5
"""Longer than the second that torch gives its helper, twice."""


def helper_of(storage: torch.UntypedStorage) -> tuple[bytes, bytes, int, int]:
    """Return what opens `storage` elsewhere, and the pid of the helper that listens on its socket."""
    manager, file, nbytes = storage._share_filename_cpu_()
    rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    inodes = {row[6] for row in rows if row[-1] == manager.decode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {os.readlink(each) for each in (process / "fd").iterdir()}
            name = (process / "comm").read_text()
        except OSError:  # it ended meanwhile
            continue
        if name.startswith("torch_shm") and held & {f"socket:[{inode}]" for inode in inodes}:
            return manager, file, nbytes, int(process.name)
    raise LookupError("no helper listens on the storage's socket")


def stop(helper: int) -> None:
    """Stop a process, and wait until it has stopped: on a busy machine it may do more before."""
    os.kill(helper, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while psutil.Process(helper).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, "the helper does not stop"


def while_it_stands_still(helper: int, work: Callable[[], None]) -> None:
    """Run `work` while the helper is stopped for `LATE_S` seconds."""
    stop(helper)
    waking = threading.Timer(LATE_S, os.kill, (helper, signal.SIGCONT))
    waking.start()
    try:
        work()
    finally:
        waking.join()


class Waking(logging.Handler):
    """Lets the helper go on when its silence has been logged, however late a busy machine comes to that."""

    def __init__(self, helper: int) -> None:
        super().__init__()
        self._helper = helper
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        os.kill(self._helper, signal.SIGCONT)


def test_an_arena_is_made_although_the_helper_is_late() -> None:
    first = Arena(1 << 20)
    helper = helper_of(first.storage)[3]
    waking, logger = Waking(helper), logging.getLogger(region.__name__)
    logger.addHandler(waking)
    arenas = [first]
    stop(helper)
    try:
        # A request that was given up earlier in this process has left its answer, which the next one takes.
        while not waking.messages and len(arenas) < 20:
            arenas.append(Arena(1 << 20))
    finally:
        os.kill(helper, signal.SIGCONT)
        logger.removeHandler(waking)
    assert "did not answer within a second" in waking.messages[0]
    for arena in arenas:
        arena.check_integrity()
        arena.close()


OPENER = """
import sys
from trtllm_mm_cache.cache.arena.region import open_shared_storage
manager, file, nbytes = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
print(bytes(open_shared_storage(manager.encode(), file.encode(), int(nbytes)))[:4], flush=True)
"""


def test_another_process_maps_an_arena_although_the_helper_is_late() -> None:
    arena = Arena(1 << 12)
    arena.storage[0:4] = 7
    manager, file, nbytes, helper = helper_of(arena.storage)
    command = [sys.executable, "-c", OPENER, manager.decode(), file.decode(), str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as opener:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
        answers: list[str] = []
        while_it_stands_still(helper, lambda: answers.append(opener.communicate("now\n", timeout=60)[0]))
    (seen,) = answers
    assert seen == f"{bytes([7] * 4)!r}\n"
    arena.close()


def test_an_arena_that_is_gone_is_an_error_of_ours() -> None:
    arena = Arena(1 << 12)
    manager, _, nbytes, _ = helper_of(arena.storage)
    with pytest.raises(SharedMemoryError, match="could not be mapped"):
        open_shared_storage(manager, b"/torch_of_no_one", nbytes)
    arena.close()


def test_the_hand_off_waits_for_a_late_helper_and_not_for_a_dead_process() -> None:
    manager = MultimodalEmbeddingCacheManager(1 << 16)
    reservation = manager.reserve("a", 8 * WIDTH * DTYPE.itemsize, owner="test")
    reservation.view.view(DTYPE).fill_(3)
    with reservation.commit(dtype=DTYPE, shape=(8, WIDTH)) as lease, OtherProcess() as other:
        handle = pickle.dumps(lease.handle(openers=1))
        seen: list[tuple[float, float]] = []
        while_it_stands_still(helper_of(manager.arena.storage)[3], lambda: seen.append(other.open(handle)))
        assert seen == [(3.0, 3.0)]
        with pytest.raises(SystemExit, match="the other process ended with 1"):
            other.open(b"no handle")
