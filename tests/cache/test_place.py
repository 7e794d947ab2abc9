"""Another process's arena, mapped for reading alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.place import ArenaPlace, MappedArena
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
    assert ArenaPlace.of(arena.storage).identity != place.identity
    arena.close()
