"""The region: committed, private, shared by name, gone after a crash; and what happens on a small host."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cache.waiting import wait_until
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.region import SHARED_MEMORY_ROOT
from trtllm_mm_cache.errors import IntegrityError, SharedMemoryError

MIB = 1024 * 1024


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(4 * MIB)
    yield arena
    arena.check_integrity()
    arena.close()


def _file(arena: Arena) -> Path:
    _, name, _ = arena.storage._share_filename_cpu_()
    return SHARED_MEMORY_ROOT / name.decode().lstrip("/")


def test_the_file_is_private_and_every_page_is_committed(arena: Arena) -> None:
    status = _file(arena).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size >= arena.capacity_bytes


@pytest.mark.parametrize("prefault", [True, False])
def test_prefaulted_pages_cost_no_faults_later(prefault: bool) -> None:
    arena = Arena(16 * MIB, prefault=prefault)
    extent = arena.allocate(16 * MIB)
    assert extent is not None
    before = _page_faults()
    arena.bytes_view(extent).fill_(1)
    faults = _page_faults() - before
    arena.close()
    assert (faults < 100) == prefault, faults


def _page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_extents_are_aligned_writable_and_lie_at_their_address(arena: Arena) -> None:
    first, second = arena.allocate(100), arena.allocate(28)
    assert first is not None
    assert second is not None
    assert (arena.base_address + second.offset) % 64 == 0
    view = arena.bytes_view(second)
    assert view.data_ptr() == arena.base_address + second.offset
    view.fill_(7)
    assert bytes(arena.buffer(second)) == b"\x07" * 28
    assert bytes(arena.buffer(first)) == bytes(100)
    arena.copy(second, arena.allocate(28) or second)
    with torch.inference_mode():
        arena.bytes_view(first).fill_(1)
    arena.bytes_view(first).fill_(2)


def test_close_removes_the_file_and_is_idempotent() -> None:
    arena = Arena(MIB)
    extent = arena.allocate(10)
    assert extent is not None
    path = _file(arena)
    arena.close()
    arena.close()
    assert not path.exists()
    for use in (lambda: arena.storage, lambda: arena.allocate(1), lambda: arena.bytes_view(extent)):
        with pytest.raises(IntegrityError, match="closed"):
            use()


def test_more_than_the_file_system_has_is_refused_by_name_and_takes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = os.statvfs(SHARED_MEMORY_ROOT)
    total = status.f_blocks * status.f_frsize
    if not 0 < total < 2**46:
        pytest.skip("shared memory has no bound here that a mapping could reach")
    before = set(SHARED_MEMORY_ROOT.iterdir())
    with pytest.raises(
        SharedMemoryError, match=r"needs .* MiB.*has .* MiB free.*lower the cache.*--shm-size"
    ):
        Arena(total + 1024 * MIB)
    # Another process may take the space between the look and the allocation: the same error, no bus error.
    monkeypatch.setattr("trtllm_mm_cache.cache.arena.region._check_free_space", lambda nbytes: None)
    with pytest.raises(SharedMemoryError, match=r"--shm-size"):
        Arena(total + 1024 * MIB)
    new = set(SHARED_MEMORY_ROOT.glob(f"torch_{os.getpid()}_*")) - before
    assert sum(path.stat().st_blocks for path in new) == 0, "torch's empty file goes with the process"


SMALL_HOST = """
mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$0" -c '
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import SharedMemoryError
try:
    MultimodalEmbeddingCacheManager(8 * 1024**2)
except SharedMemoryError as error:
    print("refused:", error)
manager = MultimodalEmbeddingCacheManager(7 * 1024**2)
manager.arena.bytes_view(manager.arena.allocate(7 * 1024**2)).fill_(1)
print("filled")
'
"""


def test_a_container_with_little_shared_memory() -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a mount namespace")
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", SMALL_HOST, sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    refused, filled = result.stdout.splitlines()
    assert "8.0 MiB of shared memory" in refused
    assert "8.0 MiB free" in refused
    assert filled == "filled"


OWNER = """
import signal
from trtllm_mm_cache.cache.arena.arena import Arena
arena = Arena(1024 * 1024)
print(arena.storage._share_filename_cpu_()[1].decode(), flush=True)
signal.pause()
"""


def test_the_region_goes_when_its_process_is_killed() -> None:
    owners = {
        number: subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
        for number in (signal.SIGKILL, signal.SIGTERM)
    }
    paths = []
    for number, owner in owners.items():
        with owner:
            assert owner.stdout is not None
            paths.append(SHARED_MEMORY_ROOT / owner.stdout.readline().strip().lstrip("/"))
            assert paths[-1].exists()
            owner.send_signal(number)
            assert owner.wait(timeout=10) == -number
    wait_until(lambda: not any(path.exists() for path in paths), deadline_s=20)
