"""The disk tier's folder: whose it is, how it is laid out, and who writes into it.

    FOLDER/secret                      what entries are sealed with, where no other file is named
    FOLDER/lock                        held by the one process that writes
    FOLDER/v1-FINGERPRINT/ab/abcd…     the entry of key abcd…; its time of modification is its last use

Whoever may read the files sees users' data: folders are 0700, files 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.tiers.disk_file import file_error
from trtllm_mm_cache.tiers.disk_index import Known, blocks
from trtllm_mm_cache.tiers.format import VERSION

logger = logging.getLogger(__name__)

_ENTRIES_FOLDER = re.compile(r"v\d+-[0-9a-f]{16}")
_KEY = re.compile(r"[0-9a-f]{64}")


class DiskFolder:
    """`root`, for the entries of the model with `fingerprint`. Not thread-safe where it changes who writes.

    It is made if need be. Raises `ConfigurationError` for a folder that is not this user's alone.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        check_folder(root)
        self._root = root
        self._entries = root / f"v{VERSION}-{fingerprint[:16]}"
        self._lock_file: int | None = None

    def path(self, key: str) -> Path:
        """Return where the entry of `key` lies, if there is one."""
        return self._entries / key[:2] / key

    def files(self) -> Iterator[Path]:
        """Yield every entry of every model and version."""
        for folder in _scandir(self._root):
            if _ENTRIES_FOLDER.fullmatch(folder.name):
                for inner in _scandir(Path(folder.path)):
                    for file in _scandir(Path(inner.path)):
                        yield Path(file.path)

    def scan(self) -> list[tuple[str, Known]]:
        """Return key, size and time of this model's entries; remove what no name fits.

        That is, for one, what a killed writer left.
        """
        found: list[tuple[str, Known]] = []
        for entry in _scandir(self._entries):
            for file in _scandir(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else ():
                status = file.stat(follow_symlinks=False)
                if _KEY.fullmatch(file.name) and stat.S_ISREG(status.st_mode):
                    found.append((file.name, Known(blocks(status.st_size), status.st_mtime_ns)))
                else:
                    with contextlib.suppress(OSError):
                        Path(file.path).unlink()
        return found

    def remove_others(self) -> None:
        """Remove what other models and older versions have left: no key leads to it any more."""
        for folder in self._root.iterdir():
            if _ENTRIES_FOLDER.fullmatch(folder.name) and folder != self._entries:
                logger.info("tier disk: the entries of another model or version are removed")
                shutil.rmtree(folder, ignore_errors=True)

    # -- one writer ----------------------------------------------------------------------------------

    def become_writer(self) -> bool:
        """Lock it for this process; False where another has. Raises `StorageError`."""
        try:
            check_folder(self._root)
            self._entries.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            opened = os.open(self._root / "lock", flags, 0o600)
        except OSError as error:
            raise file_error("nothing can be written into the folder", error) from error
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(opened)
            return False
        self._lock_file = opened
        return True

    def lock_is_gone(self) -> bool:
        """Whether the folder was removed, or exchanged, under this process."""
        if self._lock_file is None:
            return True
        try:
            return not os.path.samestat(os.fstat(self._lock_file), os.stat(self._root / "lock"))
        except OSError:
            return True

    def release(self) -> None:
        """Let another process write. Idempotent."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def check_folder(folder: Path) -> None:
    """Make `folder` for this user alone, or see that it is so. Raises `ConfigurationError`, `OSError`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigurationError(
            f"--multimodal-embedding-cache-disk-path {folder} cannot be used: {error.strerror}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"--multimodal-embedding-cache-disk-path {folder} must be a folder of the user that runs this "
            "process"
        )
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"--multimodal-embedding-cache-disk-path {folder} is open to other users; run "
            f"`chmod 700 {folder}`: what lies there is made of users' images"
        )


def _scandir(folder: Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return list(entries)
    return []
