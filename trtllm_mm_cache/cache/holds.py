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

import threading
import weakref
from collections import deque
from types import TracebackType
from typing import Any

from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.errors import IntegrityError


class Guard:
    """A mutex that refuses re-entry with an error instead of a deadlock.

    Garbage collection can run a finalizer, and with it the `finally` of an abandoned coroutine, in a
    thread that is in the middle of a cache operation. What such code needs (releasing a lease,
    quarantining a reservation) takes no lock; anything else would see half-made changes or wait for
    itself, and gets `IntegrityError`.

    Who is inside is known by the `RLock` itself, which notes it in the same step in which it is acquired.
    A field beside the lock would be set one bytecode later, and Python 3.12 collects garbage between any two.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()  # typeshed does not show `_is_owned`, which Condition relies on

    @property
    def owned(self) -> bool:
        """Whether the calling thread is inside."""
        return bool(self._lock._is_owned())

    def __enter__(self) -> None:
        if self._lock._is_owned():
            raise IntegrityError("a finalizer called into the cache in the middle of another cache operation")
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class Hold(weakref.ref[Any]):
    """A weak reference to one holder of `entry`. `by_reservation` tells its writer from its readers."""

    __slots__ = ("by_reservation", "entry")

    entry: Entry
    by_reservation: bool


class HoldRegistry:
    """The holds in force. `add`, `end` and `next_ended` need the guard; `release` does not."""

    def __init__(self) -> None:
        self._live: dict[int, Hold] = {}
        self._released: deque[Hold] = deque()

    def add(self, holder: Any, entry: Entry, *, by_reservation: bool = False) -> Hold:
        """Count `holder` among the holders of `entry` until it is garbage or released."""
        hold = Hold(holder, self._released.append)
        hold.entry = entry
        hold.by_reservation = by_reservation
        self._live[id(hold)] = hold
        entry.holders += 1
        return hold

    def release(self, hold: Hold) -> None:
        """End `hold` when the next operation begins. Any thread, any moment; twice does no harm."""
        self._released.append(hold)

    def end(self, hold: Hold) -> bool:
        """End `hold` now. Returns False when it had ended before."""
        if self._live.pop(id(hold), None) is None:
            return False
        hold.entry.holders -= 1
        return True

    def next_ended(self) -> Hold | None:
        """End the first hold that was released and return it, or return None when there is none left."""
        while self._released:
            hold = self._released.popleft()
            if self.end(hold):
                return hold
        return None

    def counted(self) -> dict[int, int]:
        """Return the number of holds in force for each `id(entry)`, for integrity checks."""
        counts: dict[int, int] = {}
        for hold in self._live.values():
            counts[id(hold.entry)] = counts.get(id(hold.entry), 0) + 1
        return counts
