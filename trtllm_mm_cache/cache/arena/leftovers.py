"""Shared memory and sockets that a killed process left behind, found and removed by the next start.

torch's helper process unlinks a region's file soon after the last process that has it is gone. It runs in a
session of its own, so it survives whatever ends a process group; but not what kills everything of a service
or a container at once. /dev/shm may outlive that (a service on the host, pods that share it), with gigabytes
in files that no process has open.

So each process keeps a register in /dev/shm: a file with the names of its regions, and of what its engine's
processes made (`engines/left_files.py`), which it holds locked.
The kernel drops the lock with the process, however that ends, and across PID namespaces, where a process
number would say nothing. A register that can be locked is a dead process's.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# glibc's shm_open, which torch calls, keeps its files here.
SHARED_MEMORY_ROOT = Path("/dev/shm")  # noqa: S108 - the system's own mount, files in it are created O_EXCL

_PREFIX = "trtllm_mm_cache."
_REGION = re.compile(r"torch_[0-9]+_[0-9]+_[0-9]+|psm_[0-9a-f]+")
"""Names that torch and Python's `multiprocessing.shared_memory` make up."""
_MOST_BYTES = 16 * 1024**2


class RegionRegister:
    """This process's register: made at its first region, removed at its end with the last. Thread-safe.

    A child that is forked shares it, lock included: then nothing is removed before both are gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def add(self, file: Path) -> None:
        """Write down that `file`, a region's or a socket's, is this process's. Raises `OSError`."""
        name = file.name if file.parent == SHARED_MEMORY_ROOT else str(file)
        with self._lock:
            if self._descriptor is None:
                self._descriptor = self._create()
            os.write(self._descriptor, os.fsencode(f"{name}\n"))

    def _create(self) -> int:
        path = SHARED_MEMORY_ROOT / f"{_PREFIX}{uuid.uuid4().hex}"
        # Under another name until it is locked, so that no start takes it for a dead process's.
        unlocked = path.with_name(f".{path.name}")
        descriptor = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(path)
        except OSError:
            os.close(descriptor)
            raise
        atexit.register(_remove_at_exit, path, os.getpid())
        return descriptor


own_register = RegionRegister()
"""This process's own."""


def remove_leftovers() -> int:
    """Unlink what dead processes of this user left; return the bytes of /dev/shm that came free.

    Only regions and sockets that such a process had written down are touched. What cannot be removed is
    left for the next start, with a line in the log.
    """
    freed = 0
    for register in SHARED_MEMORY_ROOT.glob(f"{_PREFIX}*"):
        try:
            freed += _remove_if_dead(register)
        except OSError as error:
            logger.warning("shared memory of a dead process could not be removed: %s", error.strerror)
    if freed:
        logger.warning("removed %.1f MiB of shared memory that a killed process left behind", freed / 1024**2)
    return freed


def _remove_if_dead(register: Path) -> int:
    try:
        descriptor = os.open(register, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return 0  # another start was quicker, or it is another user's
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # its process lives
        freed = sum(_unlink(left) for left in _files(file.read(_MOST_BYTES)))
        register.unlink(missing_ok=True)
    return freed


def _files(content: bytes) -> Iterator[Path]:
    # A name cut short by the end of its process does not match, or names nothing.
    for line in os.fsdecode(content).splitlines():
        if _REGION.fullmatch(line):
            yield SHARED_MEMORY_ROOT / line
        elif line.startswith("/") and _is_own_socket(line):
            yield Path(line)


def _is_own_socket(path: str) -> bool:
    try:
        found = os.lstat(path)
    except (OSError, ValueError):  # it is gone, or no path
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _unlink(file: Path) -> int:
    try:
        size = file.lstat().st_blocks * 512  # engines' own are sparse
        file.unlink()
    except FileNotFoundError:
        return 0
    return size


def _remove_at_exit(register: Path, owner: int) -> None:
    """Remove the register, if its regions are gone; those still mapped torch unlinks a little later."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        if not any(file.exists() for file in _files(register.read_bytes())):
            register.unlink()
