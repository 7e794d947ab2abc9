"""Marks: how another process says that it has filled an extent.

A mark is 16 bytes in shared memory: a number that only this filling has, and the checksum of what was
written. The writer puts the checksum first and the number last. The reader looks for the number only after
something else from the writer (a message) has told it that the writing must be over by now if it took place;
so neither waits for the other, and no order of stores between processors matters.
"""

from __future__ import annotations

import secrets
import threading

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.arena.region import create_shared_storage

_SLOT_BYTES = 64
"""A cache line each: writers of different marks do not disturb each other."""

_SLOTS = 16384
_SIGNED = 1 << 63


class Mark:
    """One mark, of the process that reads it. Belongs to one filling from `MarkBoard.open` to `close`."""

    def __init__(self, board: MarkBoard, slot: int, words: torch.Tensor) -> None:
        self._board = board
        self._slot = slot
        self._words = words
        self.nonce = secrets.randbelow(_SIGNED - 1) + 1
        words.zero_()

    @property
    def handle(self) -> Handle:
        """How the writer opens it: `[2]` of int64, for `write_mark`."""
        return Handle.of(self._words)

    def checksum(self) -> int | None:
        """Return what the writer has said, XXH3-64 over the bytes; None while it has said nothing."""
        nonce, checksum = self._words.tolist()
        return checksum % (1 << 64) if nonce == self.nonce else None

    def close(self) -> None:
        """Let another filling have the place: nothing can write to it any more. Once only."""
        self._board._close(self._slot)


class MarkBoard:
    """Room for marks, in shared memory of its own (1 MiB). Thread-safe."""

    def __init__(self) -> None:
        self._storage = create_shared_storage(_SLOTS * _SLOT_BYTES)
        self._words = torch.empty(0, dtype=torch.int64).set_(self._storage, 0, (_SLOTS, 8), (8, 1))
        self._free = list(range(_SLOTS))
        self._guard = threading.Lock()

    def open(self) -> Mark | None:
        """Return a mark that says nothing yet; None when all are in use."""
        with self._guard:
            if not self._free:
                return None
            slot = self._free.pop()
        return Mark(self, slot, self._words[slot, :2])

    def _close(self, slot: int) -> None:
        with self._guard:
            self._free.append(slot)


def write_mark(words: torch.Tensor, nonce: int, checksum: int) -> None:
    """Say that the filling `nonce` is complete; `words` is what the mark's handle leads to."""
    words[1] = checksum - (1 << 64) if checksum >= _SIGNED else checksum
    words[0] = nonce
