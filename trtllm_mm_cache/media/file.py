"""file: URLs to bytes, only below the allowed folder."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from trtllm_mm_cache.errors import (
    MediaFetchError,
    MediaForbiddenError,
    MediaReferenceError,
    MediaTooLargeError,
)

_OUTSIDE = "the file: URL does not name a file below the folder that the server allows"


def read_file_url(reference: str, allowed_folder: Path | None, max_bytes: int) -> bytes:
    """Return the content of the regular file that a `file:` URL names.

    Blocking; thread-safe. Symbolic links are followed as long as they end below `allowed_folder`
    (itself resolved on each call). The resolved path is then opened one component at a time without
    following links, so a folder exchanged for a link between the check and the open is refused too.
    Raises `MediaReferenceError` for broken syntax, `MediaForbiddenError` for anything outside the
    folder, whether it exists or not, and for anything but a regular file, `MediaFetchError` for a
    file inside that cannot be read, `MediaTooLargeError` for more than `max_bytes`.
    """
    if allowed_folder is None:
        raise MediaForbiddenError("file: URLs are not served; the operator can allow a folder for them")
    path = _path_of(reference)
    try:
        root = os.path.realpath(allowed_folder)
        resolved = os.path.realpath(path)
    except (OSError, ValueError):
        raise MediaForbiddenError(_OUTSIDE) from None
    relative = os.path.relpath(resolved, root)
    if relative == os.curdir or relative.split(os.sep, 1)[0] == os.pardir:
        raise MediaForbiddenError(_OUTSIDE)
    try:
        descriptor = _open_beneath(root, relative.split(os.sep))
    except OSError as error:
        if error.errno in {errno.ENOTDIR, errno.ELOOP}:
            raise MediaForbiddenError(_OUTSIDE) from error
        raise MediaFetchError("the file that the file: URL names cannot be opened") from error
    try:
        return _read(descriptor, max_bytes)
    except OSError as error:
        raise MediaFetchError("the file that the file: URL names cannot be read") from error
    finally:
        os.close(descriptor)


def _path_of(reference: str) -> str:
    try:
        parts = urlsplit(reference)
    except ValueError:
        raise MediaReferenceError("the file: URL cannot be parsed") from None
    if parts.netloc.lower() not in {"", "localhost"}:
        raise MediaReferenceError("the file: URL names another host; write file:///path")
    if parts.query or parts.fragment:
        raise MediaReferenceError("the file: URL has a query or fragment; percent-encode ? and #")
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if not path.startswith("/") or "\0" in path:
        raise MediaReferenceError("the file: URL has no absolute path; write file:///path")
    return path


def _open_beneath(root: str, names: list[str]) -> int:
    """Open `root/names...` for reading, following no link; the caller closes the descriptor."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Opening a device can have effects of its own, so its kind is asked before as well as after.
        _require_regular(os.stat(names[-1], dir_fd=folder, follow_symlinks=False))
        # O_NONBLOCK: a pipe put there in between must not hold the thread.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(names[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def _read(descriptor: int, max_bytes: int) -> bytes:
    status = os.fstat(descriptor)
    _require_regular(status)
    _check_size(status.st_size, max_bytes)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        content = bytearray()
        # One byte more than allowed: a file that grows while it is read is noticed.
        while len(content) <= max_bytes and (chunk := file.read(min(1 << 20, max_bytes + 1 - len(content)))):
            content += chunk
    _check_size(len(content), max_bytes)
    return bytes(content)


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MediaForbiddenError("the file: URL does not name a regular file")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaTooLargeError(
            f"the file has {size} bytes, more than the limit of {max_bytes}; use a smaller image"
        )
