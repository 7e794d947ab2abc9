"""The disk tier's storage: one file an embedding, in a folder that is its own index (`disk_folder.py`).

Times, sizes and names are all that is read at start: 10,000 files in a tenth of a second. There is no other
index that could disagree with the files, and no fsync: what a power cut leaves, its seal finds.

One process writes and keeps to the capacity; others read and touch, and one of them writes when it has gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.tiers.disk_file import OpenFile, file_error, write_file
from trtllm_mm_cache.tiers.disk_folder import DiskFolder
from trtllm_mm_cache.tiers.disk_index import DiskIndex, Known, blocks
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Header
from trtllm_mm_cache.tiers.storage import Contents, Judge, OpenEntry, StorageFullError

logger = logging.getLogger(__name__)

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
        self._folder = DiskFolder(folder, fingerprint)
        self._index = DiskIndex(capacity_bytes)
        self._indexed = False
        self._lock = threading.Lock()

    @property
    def writes(self) -> bool:
        """See `Storage.writes`."""
        return self._indexed

    def may_have(self, key: str) -> bool:
        """See `Storage.may_have`: the writer knows."""
        return not self._indexed or key in self._index

    def look_up(self, name: EntryName) -> OpenEntry | None:
        """See `Storage.look_up`."""
        opened = OpenFile.open(self._folder.path(name.key))
        with self._lock:
            if opened is None:
                self._index.remove(name.key)
            else:
                self._index.touch(name.key)
        return opened

    def store(self, name: EntryName, header: bytes, payload: memoryview) -> None:
        """See `Storage.store`. One thread at a time."""
        size = blocks(len(header) + len(payload))
        path = self._folder.path(name.key)
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
            os.utime(self._folder.path(name.key))
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
            self._unlink(self._folder.path(name.key))
        except OSError as error:
            raise file_error("an entry cannot be removed", error) from error

    def drop(self, selection: Selection, judge: Judge) -> Dropped:
        """See `Storage.drop`. By tag or content every header is read: 0.3 s for 10,000, a few when cold."""
        if selection.key is not None:
            return self._removed([self._folder.path(selection.key)])
        if selection == _EVERYTHING:
            return self._removed(self._folder.files())
        headers = ((path, _header(path, judge)) for path in self._folder.files())
        return self._removed(
            path for path, header in headers if header is None or header.selected_by(selection)
        )

    def tidy(self, judge: Judge) -> None:
        """Become the writer if there is none; as the writer, remove what is too old to be served."""
        if self._indexed and self._folder.lock_is_gone():
            self._begin_anew()
        if not self._indexed and self._folder.become_writer():
            self._folder.remove_others()
            self._scan()
        now = time.monotonic()
        if self._indexed and self._sweep_s is not None and now >= self._swept_at + self._sweep_s:
            self._swept_at = now
            self.sweep(judge)

    def sweep(self, judge: Judge) -> None:
        """Remove every entry that `judge` does not keep."""
        gone = self._removed(path for path in self._folder.files() if _header(path, judge) is None)
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

    def _begin_anew(self) -> None:
        """Stop writing; `tidy` may begin again."""
        with self._lock:
            self._indexed = False
            self._index = DiskIndex(self._index.capacity)
            self._folder.release()

    def _scan(self) -> None:
        found = self._folder.scan()
        with self._lock:
            self._index.fill(found)
            self._indexed = True
        self._make_room(0)
        logger.info("tier disk: %d entries of %d bytes", len(self._index), self._index.nbytes)

    def _make_room(self, size: int, *, more: int = 0) -> None:
        """Remove what was used longest ago until `size` bytes fit, and `more` bytes besides.

        Times of files tell of uses by other processes. What cannot be removed is passed over.
        """
        freed = 0
        for key, known in self._oldest() if more or self._index.lacks(size) else ():
            if not self._index.lacks(size) and freed >= more:
                return
            path = self._folder.path(key)
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


def _header(path: Path, judge: Judge) -> Header | None:
    opened = OpenFile.open(path, use=False)
    if opened is None:
        return None
    try:
        return judge(opened.header, path.name)
    finally:
        opened.close()
