"""Who holds which entry: weak references to leases, reservations and the buffers behind tensors.

Every tensor that leaves the cache is made by `torch.frombuffer` from a memoryview of its own. torch
keeps that memoryview alive as long as the tensor's storage, and so does everything derived from the
tensor without a copy: views (also those made under `torch.inference_mode`, which keep nothing but the
storage), numpy aliases, DLPack capsules. So the memoryview dies exactly when the last alias does.
`tests/cache/test_views.py` tries them all.

A weak reference's callback may run in any thread, between any two bytecodes, also in a thread that is
inside a cache operation and has the lock. The callback is therefore `deque.append` itself, which is
atomic and takes no lock; the next operation drains the queue.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from trtllm_mm_cache.cache.entry import Entry


class Hold(weakref.ref[Any]):
    """A weak reference to one holder of `entry`. `by_reservation` tells its writer from its readers."""

    __slots__ = ("by_reservation", "entry")

    entry: Entry
    by_reservation: bool


class HoldRegistry:
    """The holds in force. `add`, `end` and `next_ended` need the manager's lock; `let_go` needs none."""

    def __init__(self) -> None:
        self._live: dict[int, Hold] = {}
        self._let_go: deque[Hold] = deque()

    def add(self, holder: Any, entry: Entry, *, by_reservation: bool = False) -> Hold:
        """Count `holder` among the holders of `entry` until it is garbage or lets go."""
        hold = Hold(holder, self._let_go.append)
        hold.entry = entry
        hold.by_reservation = by_reservation
        self._live[id(hold)] = hold
        entry.holders += 1
        return hold

    def let_go(self, hold: Hold) -> None:
        """End `hold` when the next operation begins. Any thread, any moment; twice does no harm."""
        self._let_go.append(hold)

    def end(self, hold: Hold) -> bool:
        """End `hold` now. Returns False when it had ended before."""
        if self._live.pop(id(hold), None) is None:
            return False
        hold.entry.holders -= 1
        return True

    def next_ended(self) -> Hold | None:
        """End the first hold that was let go and return it, or return None when there is none left."""
        while self._let_go:
            hold = self._let_go.popleft()
            if self.end(hold):
                return hold
        return None

    def counted(self) -> dict[int, int]:
        """Return the number of holds in force for each `id(entry)`, for integrity checks."""
        counts: dict[int, int] = {}
        for hold in self._live.values():
            counts[id(hold.entry)] = counts.get(id(hold.entry), 0) + 1
        return counts
