"""The encode side: embeddings that lie ready for a PD worker to READ."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import TransferError
from trtllm_mm_cache.observability.metrics import gauge, samples
from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.messages import RELEASE, Export
from trtllm_mm_cache.transfer.pump import HURRIED_POLL_S, IDLE_POLL_S

logger = logging.getLogger(__name__)

# A PD worker READs within milliseconds of the answer. For this long after an export, polls are frequent.
_EXPECTING_S = 1.0


@dataclass(frozen=True)
class _Held:
    lease: Lease
    deadline: float


class Exporter(Collector):
    """Keeps exported embeddings in place until they were READ, released, or not READ for too long.

    The reader's notification is the ack: it carries the export's token and comes after the bytes were read.
    A PD worker that will not READ sends a notification that says so.
    After `lease_timeout_s` the lease is released without one, so that a PD worker that died costs no memory
    for ever. A READ that comes later still gets bytes, possibly another embedding's: the checksum in the
    `Export` is what catches that on the PD side.

    Counters: `exported = acked + released + timed_out + held`, except after the agent was closed; a lease is
    released before its export is counted as ended. `unmatched` counts notifications that fit no held export:
    acks after the timeout.

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
        self.exported = self.acked = self.released = self.timed_out = self.unmatched = 0
        agent.attach(self)

    async def export(self, lease: Lease) -> Export:
        """Take over `lease` and return what a PD worker needs to READ it.

        The exporter releases the lease in every case, also when this call fails or is cancelled. The checksum
        is the one that the entry was committed with; without one the bytes are hashed, off the event loop.
        Raises `TransferError` when the agent is closed.
        """
        checksum = lease.metadata.checksum
        if checksum is None:
            checksums = self._agent.checksums
            checksum = await checksums.compute(lease.address, lease.nbytes, release=lease.release)
        export = Export(uuid.uuid4().hex, lease.address, lease.nbytes, checksum)
        try:
            self._hold(export.token, lease)
        except TransferError:
            lease.release()
            raise
        return export

    def release(self, token: str) -> bool:
        """Release an export that will not be READ; return whether it was still held."""
        held = self._take(token)
        if held is not None:
            held.lease.release()
            with self._lock:
                self.released += 1
        return held is not None

    @property
    def held(self) -> int:
        """Exports leased until their READ."""
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """Bytes of the exports that are held."""
        with self._lock:
            return sum(held.lease.nbytes for held in self._held.values())

    def collect(self) -> Iterable[Metric]:
        """Yield the exports by how they ended, and those that are held. Any thread."""
        ends = {"read": self.acked, "released": self.released, "timed_out": self.timed_out}
        values = [({"outcome": outcome}, count) for outcome, count in ends.items()]
        yield samples(CounterMetricFamily, "exports", "Exports that ended.", values)
        yield gauge("exports_held", "Exports leased until their READ.", self.held)
        yield gauge("exports_held_bytes", "Their bytes.", self.held_bytes)

    # The agent thread calls these.

    def poll(self, nixl: Any) -> float:
        """Release what timed out; return as `Side.poll`."""
        for held in self._take_overdue():
            logger.warning(
                "an exported embedding of %d bytes was not READ within %g s; its PD worker is gone or slow",
                held.lease.nbytes,
                self._lease_timeout_s,
            )
            held.lease.release()
            with self._lock:
                self.timed_out += 1
        expecting = bool(self._held) and time.monotonic() < self._expecting_until
        return HURRIED_POLL_S if expecting else IDLE_POLL_S

    def on_notification(self, sender: str, message: bytes) -> None:
        """Release what `sender` says it has READ, or will not READ."""
        held = self._take(message.removeprefix(RELEASE).decode("ascii", errors="replace"))
        if held is not None:
            held.lease.release()
        with self._lock:
            if held is None:
                self.unmatched += 1
            elif message.startswith(RELEASE):
                self.released += 1
            else:
                self.acked += 1

    def is_busy(self) -> bool:
        """Whether an export waits for its READ."""
        return bool(self._held)

    def on_closing(self) -> None:
        """Let the agent be destroyed: a reader in the middle of a READ then sees `PeerLostError`."""

    def on_closed(self) -> None:
        """Release every lease: with the agent gone no READ can come."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, {}
        for each in held.values():
            each.lease.release()

    def _hold(self, token: str, lease: Lease) -> None:
        with self._lock:
            if self._closed:
                raise TransferError("this encode worker is shutting down; ask another one")
            self._held[token] = _Held(lease, self._clock() + self._lease_timeout_s)
            self.exported += 1
            self._expecting_until = time.monotonic() + _EXPECTING_S

    def _take(self, token: str) -> _Held | None:
        with self._lock:
            return self._held.pop(token, None)

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
            return [self._held.pop(token) for token in tokens]
