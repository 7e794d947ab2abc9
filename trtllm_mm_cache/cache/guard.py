"""The one lock of a cache manager."""

from __future__ import annotations

import threading
from threading import get_ident
from types import TracebackType

from trtllm_mm_cache.errors import IntegrityError


class Guard:
    """A mutex that refuses re-entry with an error instead of a deadlock.

    Garbage collection can run a finalizer, and with it the `finally` of an abandoned coroutine, in a
    thread that is in the middle of a cache operation. What such code needs (releasing a lease,
    quarantining a reservation) takes no lock; anything else would see half-made changes or wait for
    itself, and gets `IntegrityError`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def mine(self) -> bool:
        """Whether the calling thread is inside."""
        return self._owner == get_ident()

    def __enter__(self) -> None:
        thread = get_ident()
        if self._owner == thread:
            raise IntegrityError("a finalizer called into the cache in the middle of another cache operation")
        self._lock.acquire()
        self._owner = thread

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner = None
        self._lock.release()
