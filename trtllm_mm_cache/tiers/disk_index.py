"""What a disk tier's writer knows of the files: their sizes, in the order of their last use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

BLOCK: Final = 4096
"""A file is counted in blocks of this size, as file systems give them out: no sum of bytes is above it."""


def blocks(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


class Known(NamedTuple):
    """One file: the bytes that it counts for, and its time of modification in ns, which is its last use."""

    nbytes: int
    used_ns: int


class DiskIndex:
    """Files by key, least recently used first, of at most `capacity` bytes. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._files: OrderedDict[str, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def fill(self, found: Iterable[tuple[str, Known]]) -> None:
        """Take up what a scan has found, in the order of use."""
        for key, known in sorted(found, key=lambda each: each[1].used_ns):
            self.put(key, known)

    def put(self, key: str, known: Known) -> None:
        """Note a file that was just used."""
        self.remove(key)
        self._files[key] = known
        self.nbytes += known.nbytes

    def touch(self, key: str) -> None:
        """Note a use of a file, if it is known."""
        if key in self._files:
            self._files.move_to_end(key)

    def remove(self, key: str) -> None:
        """Forget a file, if it is known."""
        known = self._files.pop(key, None)
        if known is not None:
            self.nbytes -= known.nbytes

    def oldest(self) -> list[tuple[str, Known]]:
        """Return the files in the order in which they go, as of now."""
        return list(self._files.items())

    def lacks(self, nbytes: int) -> bool:
        """Whether something must go before a file of `nbytes` fits."""
        return self.nbytes + nbytes > self.capacity
