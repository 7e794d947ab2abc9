"""The disk tier's storage: one file an embedding, in a folder that is its own index.

    FOLDER/secret                      what entries are sealed with, where no other file is named
    FOLDER/lock                        held by the one process that writes
    FOLDER/v1-FINGERPRINT/ab/abcd…     the entry of key abcd…; its time of modification is its last use

Times, sizes and names are all that is read at start: 10,000 files in a tenth of a second. There is no other
index that could disagree with the files, and no fsync: what a power cut leaves, its seal finds.

One process writes and keeps to the capacity; others read and touch, and one of them writes when it has gone.
Whoever may read the folder's files sees users' data: folders are 0700, files 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.tiers.disk_file import OpenFile, file_error, write_file
from trtllm_mm_cache.tiers.disk_index import DiskIndex, Known, blocks
from trtllm_mm_cache.tiers.format import HEADER_BYTES, VERSION, EntryName, Header
from trtllm_mm_cache.tiers.storage import Contents, Judge, OpenEntry, StorageFullError

logger = logging.getLogger(__name__)

_ENTRIES_FOLDER = re.compile(r"v\d+-[0-9a-f]{16}")
_KEY = re.compile(r"[0-9a-f]{64}")
_EVERYTHING = Selection()


class DiskStorage:
    """`Storage` in `folder`, for the model with `fingerprint`, of at most `capacity_bytes`. Thread-safe.

    The bound holds for the sizes of all files in whole blocks, the one that is being written included. The
    folder is made if need be. With `sweep_s`, `tidy` reads all headers that often and removes what is too
    old. Raises `ConfigurationError` for a folder that is not this user's alone.
    """

    name = "disk"

    def __init__(
        self, folder: Path, fingerprint: str, capacity_bytes: int, *, sweep_s: float | None = None
    ) -> None:
        self._sweep_s = sweep_s
        self._swept_at = time.monotonic()
        self._folder = folder
        self._entries = folder / f"v{VERSION}-{fingerprint[:16]}"
        self._index = DiskIndex(capacity_bytes)
        self._indexed = False
        self._lock = threading.Lock()
        self._lock_file: int | None = None
        check_folder(folder)

    @property
    def writes(self) -> bool:
        """See `Storage.writes`."""
        return self._indexed

    def may_have(self, key: str) -> bool:
        """See `Storage.may_have`: the writer knows."""
        return not self._indexed or key in self._index

    def look_up(self, name: EntryName) -> OpenEntry | None:
        """See `Storage.look_up`."""
        opened = OpenFile.open(self._path(name.key))
        with self._lock:
            if opened is None:
                self._index.remove(name.key)
            else:
                self._index.touch(name.key)
        return opened

    def store(self, name: EntryName, header: bytes, payload: memoryview) -> None:
        """See `Storage.store`. One thread at a time."""
        size = blocks(len(header) + len(payload))
        path = self._path(name.key)
        self._make_room(size)
        try:
            try:
                used_ns = write_file(path, header, payload)
            except StorageFullError:
                self._make_room(size, more=size)  # others fill the disk, or it is smaller than the capacity
                used_ns = write_file(path, header, payload)
        except FileNotFoundError:
            self._begin_anew()
            raise file_error("the folder was removed", None) from None
        except OSError as error:
            raise file_error("an entry cannot be written", error) from error
        with self._lock:
            self._index.put(name.key, Known(size, used_ns))

    def touch(self, name: EntryName) -> bool:
        """See `Storage.touch`."""
        try:
            os.utime(self._path(name.key))
        except FileNotFoundError:
            with self._lock:
                self._index.remove(name.key)
            return False
        except OSError as error:
            raise file_error("an entry cannot be touched", error) from error
        with self._lock:
            self._index.touch(name.key)
        return True

    def remove(self, name: EntryName) -> None:
        """See `Storage.remove`."""
        try:
            self._unlink(self._path(name.key))
        except OSError as error:
            raise file_error("an entry cannot be removed", error) from error

    def drop(self, selection: Selection, judge: Judge) -> Dropped:
        """See `Storage.drop`. By tag or content every header is read: 0.3 s for 10,000, a few when cold."""
        if selection.key is not None:
            return self._removed([self._path(selection.key)])
        if selection == _EVERYTHING:
            return self._removed(self._files())
        headers = ((path, _header(path, judge)) for path in self._files())
        return self._removed(
            path for path, header in headers if header is None or header.selected_by(selection)
        )

    def tidy(self, judge: Judge) -> None:
        """Become the writer if there is none; as the writer, remove what is too old to be served."""
        if self._indexed and self._lock_is_gone():
            self._begin_anew()
        if not self._indexed and self._become_writer():
            self._sweep_others()
            self._scan()
        now = time.monotonic()
        if self._indexed and self._sweep_s is not None and now >= self._swept_at + self._sweep_s:
            self._swept_at = now
            self.sweep(judge)

    def sweep(self, judge: Judge) -> None:
        """Remove every entry that `judge` does not keep."""
        gone = self._removed(path for path in self._files() if _header(path, judge) is None)
        if gone.entries:
            logger.info("tier disk: %d entries were too old, or not entries of ours: removed", gone.entries)

    def contents(self) -> Contents:
        """See `Storage.contents`."""
        if not self._indexed:
            return Contents()
        return Contents(len(self._index), self._index.nbytes, self._index.capacity)

    def close(self) -> None:
        """Let another process write."""
        self._begin_anew()

    # -- one writer ----------------------------------------------------------------------------------

    def _become_writer(self) -> bool:
        try:
            check_folder(self._folder)
            self._entries.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            opened = os.open(self._folder / "lock", flags, 0o600)
        except OSError as error:
            raise file_error("nothing can be written into the folder", error) from error
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(opened)
            return False
        self._lock_file = opened
        return True

    def _lock_is_gone(self) -> bool:
        """Whether the folder was removed, or exchanged, under this process."""
        if self._lock_file is None:
            return True
        try:
            return not os.path.samestat(os.fstat(self._lock_file), os.stat(self._folder / "lock"))
        except OSError:
            return True

    def _begin_anew(self) -> None:
        """Stop writing; `tidy` may begin again."""
        with self._lock:
            self._indexed = False
            self._index = DiskIndex(self._index.capacity)
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def _sweep_others(self) -> None:
        """Remove what other models and older versions have left: no key leads to it any more."""
        for folder in self._folder.iterdir():
            if _ENTRIES_FOLDER.fullmatch(folder.name) and folder != self._entries:
                logger.info("tier disk: the entries of another model or version are removed")
                shutil.rmtree(folder, ignore_errors=True)

    def _scan(self) -> None:
        """Read names, sizes and times; remove what no name fits, such as what a killed writer left."""
        found: list[tuple[str, Known]] = []
        for entry in _scandir(self._entries):
            for file in _scandir(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else ():
                status = file.stat(follow_symlinks=False)
                if _KEY.fullmatch(file.name) and stat.S_ISREG(status.st_mode):
                    found.append((file.name, Known(blocks(status.st_size), status.st_mtime_ns)))
                else:
                    with contextlib.suppress(OSError):
                        Path(file.path).unlink()
        with self._lock:
            self._index.fill(found)
            self._indexed = True
        self._make_room(0)
        logger.info("tier disk: %d entries of %d bytes", len(self._index), self._index.nbytes)

    # -- room ----------------------------------------------------------------------------------------

    def _make_room(self, size: int, *, more: int = 0) -> None:
        """Remove what was used longest ago until `size` bytes fit, and `more` bytes besides.

        Times of files tell of uses by other processes. What cannot be removed is passed over.
        """
        freed = 0
        for key, known in self._oldest() if more or self._index.lacks(size) else ():
            if not self._index.lacks(size) and freed >= more:
                return
            path = self._path(key)
            with contextlib.suppress(OSError):
                used_ns = path.stat().st_mtime_ns
                if used_ns > known.used_ns:
                    with self._lock:
                        self._index.put(key, known._replace(used_ns=used_ns))
                    continue
            with contextlib.suppress(OSError):
                self._unlink(path)
                freed += known.nbytes
        if self._index.lacks(size) or freed < more:
            raise StorageFullError(f"the disk tier has no room for {size} bytes")

    def _oldest(self) -> Iterator[tuple[str, Known]]:
        """Yield the files in the order in which they go; those that turn out to be in use, once more."""
        for _ in range(2):
            with self._lock:
                files = self._index.oldest()
            yield from files

    # -- files ---------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._entries / key[:2] / key

    def _files(self) -> Iterator[Path]:
        """Yield every entry of every model and version."""
        for folder in _scandir(self._folder):
            if _ENTRIES_FOLDER.fullmatch(folder.name):
                for inner in _scandir(Path(folder.path)):
                    for file in _scandir(Path(inner.path)):
                        yield Path(file.path)

    def _removed(self, paths: Iterator[Path] | list[Path]) -> Dropped:
        keys, nbytes = [], 0
        for path in paths:
            try:
                size = path.stat().st_size
                self._unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise file_error("an entry cannot be removed", error) from error
            keys.append(path.name)
            nbytes += max(0, size - HEADER_BYTES)
        return Dropped(tuple(keys), nbytes)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with self._lock:
            self._index.remove(path.name)


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


def _header(path: Path, judge: Judge) -> Header | None:
    opened = OpenFile.open(path, use=False)
    if opened is None:
        return None
    try:
        return judge(opened.header, path.name)
    finally:
        opened.close()
