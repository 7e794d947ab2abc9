"""The seam below a tier that stores: where the bytes of entries lie. Blocking, called from threads.

A storage knows names and bytes. What an entry may be served for, when it is offered, how long a call may take
and what a failure means is the tier's (`stored.py`), the same for all storages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.errors import TransferError
from trtllm_mm_cache.tiers.format import EntryName, Header

Judge = Callable[[bytes, str], Header | None]
"""Reads an entry's header for a key, None where it is not to be kept. Raises nothing. Any thread."""


class StorageError(TransferError):
    """A storage failed: the disk, the connection to a store, or what they answer."""

    code = "storage_failed"


class StorageFullError(StorageError):
    """A storage has no room for an entry, and could make none."""

    code = "storage_full"


class Contents(NamedTuple):
    """What a storage knows of what it holds; None where only its server knows."""

    entries: int | None = None
    nbytes: int | None = None
    capacity: int | None = None


class OpenEntry(Protocol):
    """An entry that was found. One thread at a time; ends by `close`."""

    @property
    def header(self) -> bytes:
        """The first `HEADER_BYTES` bytes; fewer where the entry has no more."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the entry in all, header included."""
        ...

    def read(self, piece: memoryview, offset: int) -> int:
        """Read bytes from `offset` of the entry on into `piece`; return how many: fewer at its end.

        Offsets ascend from `HEADER_BYTES` on, without gaps. Raises `StorageError`.
        """
        ...

    def close(self) -> None:
        """Release what was opened. Idempotent; any thread."""
        ...


class Storage(Protocol):
    """Holds entries by name. Thread-safe."""

    name: str
    """For metrics and logs: `disk`, `store`."""

    @property
    def writes(self) -> bool:
        """Whether this process stores entries; False where another one does."""
        ...

    def may_have(self, key: str) -> bool:
        """Whether to look for `key`: False where it is certain, without looking, that it is not there."""
        ...

    def look_up(self, name: EntryName) -> OpenEntry | None:
        """Find an entry. Raises `StorageError`."""
        ...

    def store(self, name: EntryName, header: bytes, payload: memoryview) -> None:
        """Keep an entry, in the place of another of that name. Raises `StorageError`.

        It appears whole or not at all.
        """
        ...

    def touch(self, name: EntryName) -> bool:
        """Note a use of an entry; False where there is none. Raises `StorageError`."""
        ...

    def remove(self, name: EntryName) -> None:
        """Remove an entry, if it is there. Raises `StorageError`."""
        ...

    def drop(self, selection: Selection, judge: Judge) -> Dropped:
        """Remove what is selected, and what `judge` does not keep where headers are read. `StorageError`."""
        ...

    def tidy(self, judge: Judge) -> None:
        """Do what is due now and then; called before the first `store`. Raises `StorageError`."""
        ...

    def contents(self) -> Contents:
        """Return what is known of what lies there. Does not block."""
        ...

    def close(self) -> None:
        """Close files and connections. Does not wait for threads inside."""
        ...
