"""One file of the disk tier: read in pieces, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from trtllm_mm_cache.tiers.format import HEADER_BYTES
from trtllm_mm_cache.tiers.storage import StorageError, StorageFullError

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OpenFile:
    """`OpenEntry`: a file that was found. It stays readable when it is removed meanwhile."""

    def __init__(self, descriptor: int, header: bytes, size: int) -> None:
        self.header = header
        self.size = size
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, use: bool = True) -> OpenFile | None:
        """Open a file and read its header; None where there is none. With `use` its time says so.

        Has the kernel read the rest ahead. Raises `StorageError`.
        """
        try:
            # Not blocked by what is no file at all, and through no link.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise file_error("an entry cannot be opened", error) from error
        try:
            status = os.fstat(descriptor)
            # A folder, device or pipe in its place has no header, which is refused then.
            header = os.pread(descriptor, HEADER_BYTES, 0) if stat.S_ISREG(status.st_mode) else b""
            if use:
                os.posix_fadvise(descriptor, 0, status.st_size, os.POSIX_FADV_WILLNEED)
                with contextlib.suppress(OSError):  # a disk that can only be read from
                    os.utime(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise file_error("an entry cannot be read", error) from error
        return cls(descriptor, header, status.st_size)

    def read(self, piece: memoryview, offset: int) -> int:
        """See `OpenEntry.read`."""
        done = 0
        try:
            while done < len(piece):
                count = os.preadv(self._descriptor, [piece[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise file_error("an entry cannot be read", error) from error
        return done

    def close(self) -> None:
        """See `OpenEntry.close`."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def write_file(path: Path, header: bytes, payload: memoryview) -> int:
    """Write a file that appears whole or not at all, in the place of another; return its time in ns.

    Room for all of it is taken first. Raises `StorageFullError`, `OSError`.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary: Path | None = None
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
        temporary = _temporary(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write(descriptor, header, payload)
            if temporary is None:
                temporary = _link(descriptor, path)
            used_ns = os.fstat(descriptor).st_mtime_ns
            if temporary is not None:
                temporary.replace(path)
                temporary = None
        finally:
            os.close(descriptor)
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError("the file system of the disk tier is full") from error
        raise
    return used_ns


def file_error(what: str, error: OSError | None) -> StorageError:
    """Return the error for what the file system refused, without the path."""
    return StorageError(what if error is None else f"{what}: {error.strerror}")


def _write(descriptor: int, header: bytes, payload: memoryview) -> None:
    os.posix_fallocate(descriptor, 0, len(header) + len(payload))
    for part, start in ((memoryview(header), 0), (payload, len(header))):
        done = 0
        while done < len(part):
            done += os.pwritev(descriptor, [part[done:]], start + done)


def _link(descriptor: int, path: Path) -> Path | None:
    """Give an unnamed file its name; where that is taken return another, for the file to replace it."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.link(str(descriptor), path, src_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            temporary = _temporary(path)
            os.link(str(descriptor), temporary, src_dir_fd=folder, follow_symlinks=True)
            return temporary
    finally:
        os.close(folder)
    return None


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{secrets.token_hex(8)}")
