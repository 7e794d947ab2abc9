"""Another process's arena, mapped for reading alone."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from trtllm_mm_cache.cache.arena import place as places
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.place import ArenaPlace, MappedArena, this_machine
from trtllm_mm_cache.errors import SharedMemoryError

MB = 1024**2


def test_an_arena_of_another_user_is_not_mapped() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    arena = Arena(1 * MB)
    file = Path("/dev/shm", arena.place.file)  # noqa: S108
    MappedArena(arena.place).populate()
    os.chown(file, 65534, 65534)
    with pytest.raises(SharedMemoryError, match="another user's"):
        MappedArena(arena.place)
    os.chown(file, 0, 0)
    arena.close()


@pytest.mark.parametrize(("kind", "reason"), [("pipe", "is no file"), ("link", "cannot be opened")])
def test_what_has_an_arenas_name_and_is_no_file_is_neither_followed_nor_waited_for(
    kind: str, reason: str
) -> None:
    arena = Arena(1 * MB)
    false = Path("/dev/shm", f"torch_{os.getpid()}_1_{kind == 'link':d}")  # noqa: S108
    if kind == "pipe":
        os.mkfifo(false)
    else:
        false.symlink_to(arena.place.file)
    try:
        with pytest.raises(SharedMemoryError, match=reason):
            MappedArena(replace(arena.place, file=false.name))
    finally:
        false.unlink()
        arena.close()


def test_a_mapping_is_read_only_and_ends_where_the_arena_ends() -> None:
    arena = Arena(1 * MB)
    place = arena.place
    mapped = MappedArena(place)
    assert mapped.local(place.address + 1 * MB - 64, 64) != place.address
    for address, nbytes in [(place.address - 1, 1), (place.address, 1 * MB + 1), (place.address, -1)]:
        with pytest.raises(SharedMemoryError, match="not in the arena"):
            mapped.local(address, nbytes)
    lines = Path("/proc/self/maps").read_text().splitlines()
    modes = sorted(line.split()[1] for line in lines if place.file in line)
    assert modes == ["r--s", "rw-s"]
    libc, page = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p(mapped.local(place.address, 64) - 64)
    assert libc.mprotect(page, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1, "nor can it be made writable"
    assert ctypes.get_errno() == errno.EACCES
    assert ArenaPlace.of(arena.storage).identity != place.identity
    arena.close()


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    yield
    this_machine.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
def test_another_host_and_another_boot_are_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(host: str, boot: str | None) -> str:
        boot_id = tmp_path / f"boot id {boot}"
        if boot is not None:
            boot_id.write_text(f"{boot}\n")
        monkeypatch.setattr(places, "_BOOT_ID", boot_id)
        monkeypatch.setattr(places.os, "uname", lambda: SimpleNamespace(nodename=host))
        this_machine.cache_clear()
        return this_machine()

    one = told("host", "boot")
    assert told("host", "boot") == one
    assert len({one, told("host", "other"), told("other", "boot")}) == 3
    assert told("host", None) != told("host", None), "what is not known is no sameness"
