"""One READ: what its caller waits for, and how far it has come."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import Any

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.transfer.finite import Pass
from trtllm_mm_cache.transfer.messages import Export, PeerMetadata
from trtllm_mm_cache.transfer.peers import Peer


class Chunk:
    """A part of a READ, `nbytes` long, with a NIXL handle of its own."""

    def __init__(self, handle: Any, nbytes: int) -> None:
        self.handle = handle
        self.nbytes = nbytes


class Read:
    """One READ of `export` from `peer` to registered memory at `local_address`.

    `outcome` is what to tell the caller: checksum of the bytes that arrived and whether their values, of
    `finite_dtype`, are finite; or the error. Cancelling it works, and says so by its result, until NIXL has
    the READ; then the READ never begins, and what to do instead is `leave`. `deadline`, on
    `time.monotonic()`, is when a READ that is still queued fails, and from when on one in flight is overdue;
    it never ends one in flight.

    `settled` gets its result, always None, when no byte can arrive at `local_address` any more. After the
    agent's end, or when NIXL has forgotten the peer, it may never get it.
    """

    def __init__(
        self,
        peer: PeerMetadata,
        export: Export,
        local_address: int,
        *,
        deadline: float,
        finite_dtype: str | None = None,
    ) -> None:
        self.peer = peer
        self.export = export
        self.local_address = local_address
        self.finite_dtype = finite_dtype
        self.deadline = deadline
        self.outcome: Future[tuple[int, bool]] = Future()
        self.settled: Future[None] = Future()
        self.waiting: deque[Chunk] = deque()  # not asked for yet
        self.in_flight: deque[Chunk] = deque()
        self.arrived_bytes = 0
        self.check: Pass | None = None
        self.connection: Peer | None = None
        self.error: MmCacheError | None = None
        self.is_left = False
        # Weak, because a future keeps its callbacks: the two would keep each other, and with them the error
        # and all that its traceback leads to, until the garbage collector runs.
        self.outcome.add_done_callback(partial(_settle_unless_posted, weakref.ref(self)))

    @property
    def posted(self) -> bool:
        """Whether NIXL has, or had, the READ."""
        return self.connection is not None

    def leave(self) -> None:
        """Say that nobody waits for the outcome: what is in flight settles, the rest is not asked for."""
        self.is_left = True

    @property
    def is_forgotten(self) -> bool:
        """Whether a chunk is in flight whose end NIXL will not report."""
        return self.connection is not None and self.connection.forgotten and bool(self.in_flight)

    @property
    def is_unwanted(self) -> bool:
        """Whether no further chunk is to be asked for."""
        return self.is_left or self.error is not None

    def complete(self, error: MmCacheError | None, found: tuple[int, bool] = (0, False)) -> None:
        """Tell the caller, who may have been told already."""
        if self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(found)
        else:
            self.outcome.set_exception(error)


def _settle_unless_posted(reference: weakref.ref[Read], outcome: Future[tuple[int, bool]]) -> None:
    read = reference()
    if read is not None and not read.posted:
        read.settled.set_result(None)
