"""Where another process of the same machine finds an arena, and its mapping of it, for reading alone.

A file's name may come again after a restart, so it proves nothing: each arena writes a random identity into
the part of its file's header that torch leaves free, and who maps the file compares it with the one that it
was told. A mapping is of the file, not of its name: it stays what it was, and readable, when the arena's
process is gone, and another process's arena never appears in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
import uuid
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import blake3
import numpy as np
import torch

from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT
from trtllm_mm_cache.cache.arena.region import HEADER_BYTES, storage_path
from trtllm_mm_cache.errors import SharedMemoryError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FILE = re.compile(r"torch_[0-9]+_[0-9]+_[0-9]+")
_IDENTITY_AT, _IDENTITY_BYTES = 16, 16

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_POPULATE_READ = 22
_POPULATED_BYTES = 32 * 1024**2  # at a time: the kernel's lock on the mappings is held meanwhile


@dataclass(frozen=True, slots=True)
class ArenaPlace:
    """An arena of `nbytes` bytes in the shared-memory `file`, on `machine`.

    `address` is where it begins in the process that made it, `identity` what its file's header holds (32 hex
    digits). Picklable and made of strings and numbers alone.
    """

    machine: str
    file: str
    nbytes: int
    identity: str
    address: int

    @classmethod
    def of(cls, storage: torch.UntypedStorage) -> ArenaPlace:
        """Give a new shared storage an identity, and return its place. Once for each storage."""
        identity = uuid.uuid4()
        ctypes.memmove(storage.data_ptr() - HEADER_BYTES + _IDENTITY_AT, identity.bytes, _IDENTITY_BYTES)
        file = storage_path(storage).name
        return cls(this_machine(), file, storage.nbytes(), identity.hex, storage.data_ptr())


@cache
def this_machine() -> str:
    """Return what tells this machine, since it was started, from every other: of host name and boot id."""
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = uuid.uuid4().hex  # as good as no other machine's
    return blake3.blake3(f"{os.uname().nodename} {boot}".encode()).hexdigest(length=16)


class MappedArena:
    """Another process's arena, mapped read-only: microseconds, whatever its size.

    Keeps the arena's memory in being, also after the end of its process, until it is garbage-collected: see
    `is_orphaned`. Thread-safe.
    """

    def __init__(self, place: ArenaPlace) -> None:
        """Raises `SharedMemoryError` when it is not there, another user's, or another arena."""
        self.place = place
        self._descriptor = _open(place)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            _check(os.fstat(self._descriptor), place)
            self._memory = mmap.mmap(self._descriptor, HEADER_BYTES + place.nbytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"it cannot be mapped: {error}") from error
        found = self._memory[_IDENTITY_AT : _IDENTITY_AT + _IDENTITY_BYTES]
        if found.hex() != place.identity:
            raise SharedMemoryError("another arena has its file's name")
        # The array keeps the mapping, and says where it lies: ctypes would want to write to it.
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._start = int(self._bytes.ctypes.data) + HEADER_BYTES

    def populate(self) -> None:
        """Map the pages ahead of their first use, which would cost a fault for each 16. Blocking, optional.

        Takes about 0.1 s a GiB. Does nothing on kernels older than Linux 5.14.
        """
        start, end = self._start - HEADER_BYTES, self._start + self.place.nbytes
        for address in range(start, end, _POPULATED_BYTES):
            if _madvise(address, min(_POPULATED_BYTES, end - address), _MADV_POPULATE_READ) != 0:
                return

    @property
    def is_orphaned(self) -> bool:
        """Whether the file has no name any more: its process is gone, and only mappings keep its memory."""
        return os.fstat(self._descriptor).st_nlink == 0

    def local(self, address: int, nbytes: int) -> int:
        """Return where `nbytes` bytes at the owner's `address` lie here. `SharedMemoryError` if outside."""
        offset = address - self.place.address
        if offset < 0 or nbytes < 0 or offset + nbytes > self.place.nbytes:
            raise SharedMemoryError(f"{nbytes} bytes at that address are not in the arena")
        return self._start + offset


def _open(place: ArenaPlace) -> int:
    if not _FILE.fullmatch(place.file):
        raise SharedMemoryError("its file has an impossible name")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(SHARED_MEMORY_ROOT / place.file, flags)
    except OSError as error:
        raise SharedMemoryError(f"its file cannot be opened: {error.strerror}") from error


def _check(found: os.stat_result, place: ArenaPlace) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise SharedMemoryError("its file is no file, or another user's")
    # Its owner never shortens it; a shorter one would be a bus error at the first look.
    if found.st_size < HEADER_BYTES + place.nbytes:
        raise SharedMemoryError("its file is of another size")
