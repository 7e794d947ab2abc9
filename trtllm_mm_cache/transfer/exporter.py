"""The encode side: embeddings that lie ready for a PD worker to READ."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import TransferError
from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.messages import RELEASE, Export

logger = logging.getLogger(__name__)

# A PD worker READs within milliseconds of the answer. For this long after an export, polls are frequent.
_EXPECTING_S = 1.0


@dataclass(frozen=True)
class ExporterStatistics:
    """Snapshot. `exported = acked + released + timed_out + held`, except after the agent was closed.

    `unmatched` counts notifications that fit no held export: acks after the timeout, or from the wrong agent.
    """

    exported: int
    acked: int
    released: int
    timed_out: int
    unmatched: int
    held: int
    held_bytes: int


@dataclass(frozen=True)
class _Held:
    lease: Lease
    reader_name: str | None
    deadline: float


class Exporter:
    """Keeps exported embeddings in place until they were READ, given up, or not READ for too long.

    The READ's own notification is the ack: it carries the export's token and comes after the bytes were read.
    A PD worker that will not READ sends a notification that says so.
    After `lease_timeout_s` the lease is released without one, so that a PD worker that died costs no memory
    for ever. A READ that comes later still gets bytes, possibly another embedding's: the checksum in the
    `Export` is what catches that on the PD side.

    `clock` counts seconds; the agent thread compares it with the deadlines about every millisecond.
    Thread-safe. Leases are released on the agent thread. Ends with the agent: closing that releases them all.
    """

    def __init__(
        self, agent: TransferAgent, *, lease_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._agent = agent
        self._lease_timeout_s = lease_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # in the order of their deadlines, since all have the same timeout
        self._closed = False
        self._expecting_until = 0.0
        self._exported = self._acked = self._released = self._timed_out = self._unmatched = 0
        agent.attach(self)

    async def export(
        self, lease: Lease, *, reader_name: str | None = None, checksum: int | None = None
    ) -> Export:
        """Take over `lease` and return what a PD worker needs to READ it.

        The exporter releases the lease in every case, also when this call fails or is cancelled. With
        `reader_name`, only that NIXL agent's notification counts as the ack. `checksum` is that of an earlier
        `Export` of the same entry, where the caller kept it; without it the bytes are hashed, off the event
        loop. Raises `TransferError` when the agent is closed.
        """
        if checksum is None:
            checksums = self._agent.checksums
            checksum = await checksums.compute(lease.address, lease.nbytes, give_back=lease.release)
        export = Export(uuid.uuid4().hex, lease.address, lease.nbytes, checksum)
        try:
            self._hold(export.token, lease, reader_name)
        except TransferError:
            lease.release()
            raise
        return export

    def release(self, token: str) -> bool:
        """Give up an export that nobody will READ; return whether it was still held."""
        with self._lock:
            held = self._held.pop(token, None)
            self._released += held is not None
        if held is not None:
            held.lease.release()
        return held is not None

    def statistics(self) -> ExporterStatistics:
        """Return a consistent snapshot."""
        with self._lock:
            return ExporterStatistics(
                exported=self._exported,
                acked=self._acked,
                released=self._released,
                timed_out=self._timed_out,
                unmatched=self._unmatched,
                held=len(self._held),
                held_bytes=sum(held.lease.nbytes for held in self._held.values()),
            )

    # The agent thread calls these.

    def poll(self, nixl: Any) -> bool:
        """Release what timed out."""
        overdue = self._take_overdue()
        for held in overdue:
            logger.warning(
                "an exported embedding of %d bytes was not READ within %g s; its PD worker is gone or slow",
                held.lease.nbytes,
                self._lease_timeout_s,
            )
            held.lease.release()
        return bool(self._held) and time.monotonic() < self._expecting_until

    def on_notification(self, sender: str, message: bytes) -> None:
        """Release what `sender` says it has READ, or will not READ."""
        token = message.removeprefix(RELEASE).decode("ascii", errors="replace")
        with self._lock:
            held = self._held.get(token)
            if held is None or held.reader_name not in (None, sender):
                self._unmatched += 1
                return
            del self._held[token]
            if message.startswith(RELEASE):
                self._released += 1
            else:
                self._acked += 1
        held.lease.release()

    def is_busy(self) -> bool:
        """Whether an export waits for its READ."""
        return bool(self._held)

    def let_go(self) -> None:
        """Let the agent be destroyed: a reader in the middle of a READ then sees `PeerLostError`."""

    def on_closed(self) -> None:
        """Release every lease: with the agent gone nobody can READ."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, {}
        for each in held.values():
            each.lease.release()

    def _hold(self, token: str, lease: Lease, reader_name: str | None) -> None:
        with self._lock:
            if self._closed:
                raise TransferError("this encode worker is shutting down; ask another one")
            self._held[token] = _Held(lease, reader_name, self._clock() + self._lease_timeout_s)
            self._exported += 1
            self._expecting_until = time.monotonic() + _EXPECTING_S

    def _take_overdue(self) -> list[_Held]:
        if not self._held:
            return []
        now = self._clock()
        with self._lock:
            tokens = []
            for token, held in self._held.items():
                if held.deadline > now:
                    break
                tokens.append(token)
            self._timed_out += len(tokens)
            return [self._held.pop(token) for token in tokens]
