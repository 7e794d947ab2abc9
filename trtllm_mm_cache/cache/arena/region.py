"""One storage in file-system shared memory, committed and prefaulted before its first use.

torch makes the storage (so that views of it can be handed to other processes as handles), names its file
`/torch_...` and starts one helper process, which unlinks the file when the last process that has it is
gone, killed ones included (`leftovers` is for the case that the helper was killed too). The data begin 64
bytes into the file; torch keeps a reference count before them.

Writing to a mapping whose file system is full is a bus error, which kills the process, possibly hours
after the start. So every page is committed here, by calls that answer with an error number instead:

1. `statvfs` says early, before anything is taken, that the capacity cannot fit;
2. `posix_fallocate` takes the pages from the file system (ENOSPC when another process was quicker);
   torch 2.13 does so itself, older ones leave the file sparse;
3. `madvise(MADV_POPULATE_WRITE)` maps them (Linux 5.14 and newer; older kernels: `memset`).

Measured for 1 GiB on tmpfs: 0.13 s + 0.24 s, against 0.6 to 2.1 s for touching the pages by `memset`.
The calls made here release the GIL while they run.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from trtllm_mm_cache.cache.arena.large_pages import ask_for_large_pages, report_large_pages
from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT, own_register, remove_leftovers
from trtllm_mm_cache.errors import SharedMemoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MANAGER_ATTEMPTS = 10
_NO_ANSWER = "Shared memory manager connection has timed out"
HEADER_BYTES = 64
"""What torch keeps before a shared storage's data: the count of its openers, an `int32`, comes first."""
_MADV_POPULATE_WRITE = 23
_PAGE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memset.restype = ctypes.c_void_p


def create_shared_storage(nbytes: int, *, prefault: bool = True) -> torch.UntypedStorage:
    """Return a zeroed shared storage of `nbytes` bytes whose file has mode 0600.

    Its pages are taken from the file system in any case; `prefault` also maps them, without which the
    first write to each page costs a fault (0.5 s a GiB in sum). Blocks for the times above.

    Raises `SharedMemoryError` when the file system has too little room.
    """
    remove_leftovers()
    _check_free_space(nbytes)
    try:
        storage = patiently(lambda: torch.UntypedStorage._new_using_filename_cpu(nbytes))
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise _too_small(nbytes) from error
        raise SharedMemoryError(f"torch could not create {_mib(nbytes)} of shared memory") from error
    path = storage_path(storage)
    _write_down(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
        _commit(descriptor, nbytes)
    finally:
        os.close(descriptor)
    if prefault:
        whole = (storage.data_ptr() - HEADER_BYTES, nbytes + HEADER_BYTES)
        ask_for_large_pages(*whole)
        _populate(storage)
        report_large_pages(*whole)
    return storage


def open_shared_storage(manager: bytes, file: bytes, nbytes: int) -> torch.UntypedStorage:
    """Map a shared storage of another process, by what its `_share_filename_cpu_()` returned there.

    Raises `SharedMemoryError` when it cannot be mapped, for example because its process is gone.
    """
    try:
        return patiently(lambda: torch.UntypedStorage._new_shared_filename_cpu(manager, file, nbytes))
    except RuntimeError as error:
        raise SharedMemoryError(
            f"another process's {_mib(nbytes)} of shared memory could not be mapped"
        ) from error


def patiently(ask_manager: Callable[[], T]) -> T:
    """Return what `ask_manager` returns; call it once more when torch's helper process has not answered it.

    torch gives it one second, which a machine with busy cores may need more than once. A request that
    went unanswered has mapped nothing, and what the helper noted of it ends with this process.
    """
    for _ in range(_MANAGER_ATTEMPTS - 1):
        try:
            return ask_manager()
        except RuntimeError as error:
            if _NO_ANSWER not in str(error):
                raise
            logger.warning("torch's shared-memory helper did not answer within a second; asking again")
    return ask_manager()


def storage_path(storage: torch.UntypedStorage) -> Path:
    """Return the file of a storage that lies in file-system shared memory."""
    _, name, _ = storage._share_filename_cpu_()
    return SHARED_MEMORY_ROOT / os.fsdecode(name).lstrip("/")


def _write_down(path: Path) -> None:
    try:
        own_register.add(path)
    except OSError as error:
        raise SharedMemoryError(
            f"the register of this process's shared memory cannot be kept in /dev/shm: {error.strerror}"
        ) from error


def _free_bytes() -> int:
    try:
        status = os.statvfs(SHARED_MEMORY_ROOT)
    except OSError as error:
        raise SharedMemoryError(
            f"there is no shared-memory file system at /dev/shm: {error.strerror}"
        ) from error
    return status.f_bavail * status.f_frsize


def _check_free_space(nbytes: int) -> None:
    if nbytes + HEADER_BYTES + _PAGE > _free_bytes():
        raise _too_small(nbytes)


def _too_small(nbytes: int) -> SharedMemoryError:
    return SharedMemoryError(
        f"the cache needs {_mib(nbytes)} of shared memory, but the shared-memory file system /dev/shm has "
        f"{_mib(_free_bytes())} free: lower the cache capacity, or give the container more shared memory "
        "(docker run --shm-size=..., in Kubernetes an emptyDir with medium: Memory mounted at /dev/shm, "
        "on a host mount -o remount,size=... /dev/shm)"
    )


def _commit(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise SharedMemoryError(f"shared memory could not be committed: {error.strerror}") from error
        raise _too_small(nbytes) from error


def _populate(storage: torch.UntypedStorage) -> None:
    start = storage.data_ptr() - HEADER_BYTES
    if _libc.madvise(start, storage.nbytes() + HEADER_BYTES, _MADV_POPULATE_WRITE) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise SharedMemoryError(f"shared memory could not be mapped: {os.strerror(number)}")
    # The pages are committed, so this cannot fault fatally; it is only slower.
    _libc.memset(storage.data_ptr(), 0, storage.nbytes())


def _mib(nbytes: int) -> str:
    return f"{nbytes / 1024**2:.1f} MiB"
