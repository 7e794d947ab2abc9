"""Shared memory after a crash: what a killed process leaves, who removes it, and whose stays."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_mm_cache.cache.arena import leftovers
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT, remove_leftovers

CAPACITY = 4 * 1024**2

# Apart from the registers of every other test's processes, which start and end at the same time.
PREFIX = f"trtllm_mm_cache_test_{os.getpid()}."

OWNER = f"""
import sys
from trtllm_mm_cache.cache.arena import leftovers
leftovers._PREFIX = {PREFIX!r}
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.region import storage_path
arenas = [Arena({CAPACITY}) for _ in range(2)]
print(*(storage_path(arena.storage) for arena in arenas), flush=True)
if sys.stdin.read():
    for arena in arenas:
        arena.close()
"""


class Owner:
    """A process with two arenas, and torch's helper for them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.regions: list[Path] = []
        self.helper = 0

    def await_regions(self) -> None:
        assert self.process.stdout is not None
        self.regions = [Path(path) for path in self.process.stdout.readline().split()]
        assert len(self.regions) == 2
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (self.helper,) = (int(child) for child in children)

    def register(self) -> Path:
        names = {region.name for region in self.regions}
        registers = SHARED_MEMORY_ROOT.glob(f"{PREFIX}*")
        (found,) = (path for path in registers if names & set(path.read_text().split()))
        return found

    def left(self) -> list[bool]:
        """Whether each of its regions has its file."""
        return [region.exists() for region in self.regions]

    def close(self) -> None:
        if self.helper:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.helper, signal.SIGKILL)
        self.process.kill()
        self.process.communicate(timeout=10)
        for region in self.regions:
            region.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_PREFIX", PREFIX)


@pytest.fixture
def owners() -> Iterator[list[Owner]]:
    """Two of them; importing torch takes them seconds, which they spend together."""
    started = [Owner(), Owner()]
    try:
        for owner in started:
            owner.await_regions()
        yield started
    finally:
        for owner in started:
            owner.close()


def test_the_next_start_removes_what_a_killed_process_left_and_nothing_else(
    owners: list[Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = owners
    register = owner.register()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (register, *owner.regions))
    strangers = SHARED_MEMORY_ROOT / f"torch_{owner.process.pid}_1_1"
    precious = SHARED_MEMORY_ROOT / f"precious_{os.getpid()}"
    for path in (strangers, precious):
        path.write_bytes(b"of another program")
    with register.open("ab") as file:  # damaged, it must not become a list of files to delete
        file.write(f"{precious.name}\n../{precious}\n{precious}\ntorch_1_2_3/../{precious.name}\n".encode())
        file.write(b"\xff\n\0")
    try:
        os.kill(owner.helper, signal.SIGKILL)
        owner.process.kill()
        owner.process.wait(timeout=10)
        assert owner.left() == [True, True], "no process is there to remove them"
        with monkeypatch.context() as patch:
            patch.setattr(leftovers.os, "geteuid", lambda: os.getuid() + 1)
            assert remove_leftovers() == 0, "another user's"
        Arena(64).close()
        assert owner.left() == [False, False]
        assert not register.exists()
        assert other.left() == [True, True], "its process lives"
        assert other.register().exists()
        assert strangers.exists(), "no register named it"
        assert precious.exists(), "it is no region"
    finally:
        strangers.unlink()
        precious.unlink()


def test_an_orderly_end_leaves_nothing_or_a_register_of_what_it_leaves(owners: list[Owner]) -> None:
    closing, open_ended = owners
    register = closing.register()
    closing.process.communicate("close", timeout=30)
    assert closing.left() == [False, False]
    assert not register.exists()
    # As a service manager does it that kills what is left of a service once its main process has ended.
    os.kill(open_ended.helper, signal.SIGSTOP)
    open_ended.process.communicate(timeout=30)
    os.kill(open_ended.helper, signal.SIGKILL)
    assert open_ended.left() == [True, True]
    assert remove_leftovers() >= 2 * CAPACITY
    assert open_ended.left() == [False, False]


def test_a_link_in_a_registers_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "register"
    target.write_text("torch_1_2_3\n")
    link = SHARED_MEMORY_ROOT / f"{PREFIX}link"
    link.symlink_to(target)
    try:
        assert remove_leftovers() == 0
        assert link.is_symlink()
    finally:
        link.unlink()
