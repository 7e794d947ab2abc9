"""The PD side: READs an exported embedding into a reserved extent of the arena."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    InvalidEmbeddingError,
    TransferError,
    TransferTimeoutError,
)
from trtllm_mm_cache.observability.metrics import counter, gauge, samples
from trtllm_mm_cache.threads import shielded
from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.messages import RELEASE, Export, PeerMetadata
from trtllm_mm_cache.transfer.read import Read
from trtllm_mm_cache.transfer.reads import ReadTable

logger = logging.getLogger(__name__)

DEFAULT_MAX_PEERS = 256


class Reader(Collector):
    """READs from exporters, connecting to each at its first READ.

    A peer is forgotten when a READ from it fails, and when `max_peers` would be exceeded and it is the idle
    one that was read from longest ago; the next READ connects again. While a READ from a peer is overdue, no
    other is begun from it, so that a frozen peer ties up only what was asked of it within one deadline.

    Counters, at most one poll old: `completed` READs brought their bytes, `completed_bytes` in all; of these
    the checksum of `corrupt` disagreed, and `not_finite` brought NaN or infinity where that is refused.
    `failed` READs NIXL reported as failed; `timed_out` had not settled at their deadline.

    Thread-safe, except that `read_into` belongs to an event loop. Ends with the agent.
    """

    def __init__(self, agent: TransferAgent, *, max_peers: int = DEFAULT_MAX_PEERS) -> None:
        self._agent = agent
        self._table = ReadTable(agent.library, max_peers)
        self.timed_out = self.corrupt = self.not_finite = 0
        agent.attach(self)

    @property
    def completed(self) -> int:
        """READs that brought their bytes."""
        return self._table.completed

    @property
    def completed_bytes(self) -> int:
        """Bytes that READs brought."""
        return self._table.completed_bytes

    @property
    def failed(self) -> int:
        """READs that NIXL reported as failed."""
        return self._table.failed

    @property
    def in_flight(self) -> int:
        """READs that have not settled."""
        return self._table.in_flight

    @property
    def unsettled(self) -> int:
        """READs in flight that are past their deadline, or of which NIXL will report no end."""
        return self._table.unsettled

    @property
    def peers(self) -> int:
        """Connected exporters."""
        return self._table.peers

    def collect(self) -> Iterable[Metric]:
        """Yield the READs by how they ended, and those in flight. Any thread."""
        ends = {
            "done": self.completed - self.corrupt - self.not_finite,
            "failed": self.failed,
            "timed_out": self.timed_out,
            "corrupt": self.corrupt,
            "not_finite": self.not_finite,
        }
        values = [({"outcome": outcome}, count) for outcome, count in ends.items()]
        yield samples(CounterMetricFamily, "reads", "NIXL READs that ended.", values)
        yield counter("read_bytes", "Bytes that READs brought.", self.completed_bytes)
        yield gauge("reads_in_flight", "READs NIXL works on.", self.in_flight)
        yield gauge("reads_unsettled", "Those past their deadline.", self.unsettled)

    async def read_into(
        self,
        reservation: Reservation,
        peer: PeerMetadata,
        export: Export,
        *,
        deadline_s: float,
        finite_dtype: str | None = None,
    ) -> None:
        """Fill `reservation` with the bytes of `export`, checked, and leave the commit to the caller.

        With `finite_dtype`, a torch dtype's name, values of it that are NaN or infinite are refused.

        When it returns, the reservation is open and whole. When it raises (also `CancelledError`), the
        reservation is no longer the caller's: it is abandoned, or, while the READ has not settled, in
        quarantine, from where it comes back when NIXL reports the READ's end; never by time alone.

        Raises `TransferTimeoutError` when the READ has not settled after `deadline_s`, `PeerLostError` when
        the exporter is gone, `ChecksumMismatchError` when other bytes arrived than were exported,
        `InvalidEmbeddingError` when values are not finite, `EmbeddingMismatchError` when the reservation has
        another size, `TransferError` when NIXL refuses.
        """
        self._check_size(reservation, peer, export)
        found, finite = await self._fill(reservation, peer, export, deadline_s, finite_dtype)
        self._judge(reservation, export, found, finite=finite)

    def begin(
        self,
        peer: PeerMetadata,
        export: Export,
        local_address: int,
        *,
        deadline_s: float,
        finite_dtype: str | None = None,
    ) -> Read:
        """Start a READ, for callers that account for the memory themselves: see `Read`.

        Its `outcome` fails with the errors of `read_into` that are not about the bytes, but not by the
        deadline once it is in flight. Raises `TransferError` when the agent is closed.
        """
        deadline = time.monotonic() + deadline_s
        read = Read(peer, export, local_address, deadline=deadline, finite_dtype=finite_dtype)
        self._agent.begin(read.outcome, lambda nixl: self._table.post(nixl, read))
        return read

    def release(self, peer: PeerMetadata, token: str) -> None:
        """Tell the exporter, some time soon, that no READ of the export `token` will come.

        It then releases its lease at once instead of at its timeout, which is also what remains when it
        cannot be told: a frozen or dead exporter, or a closed agent, is no error here.
        """
        self._tell(peer, RELEASE + token.encode())

    def _tell(self, peer: PeerMetadata, message: bytes) -> None:
        with suppress(TransferError):
            told = self._agent.call(lambda nixl: self._table.notify(nixl, peer, message))
            told.add_done_callback(_log_failure)

    def _check_size(self, reservation: Reservation, peer: PeerMetadata, export: Export) -> None:
        if reservation.nbytes != export.nbytes:
            reservation.abandon()
            self.release(peer, export.token)
            raise EmbeddingMismatchError(
                f"the encode worker exported {export.nbytes} bytes where {reservation.nbytes} were reserved"
            )

    async def _fill(
        self,
        reservation: Reservation,
        peer: PeerMetadata,
        export: Export,
        deadline_s: float,
        finite_dtype: str | None,
    ) -> tuple[int, bool]:
        """Return the checksum of what arrived, and whether its values are finite."""
        read: Read | None = None
        try:
            read = self.begin(
                peer, export, reservation.address, deadline_s=deadline_s, finite_dtype=finite_dtype
            )
            return await self._outcome(read, deadline_s)
        except BaseException:
            self._end_unfilled(reservation, peer, export.token, read)
            raise
        finally:
            del read  # it has the outcome, and the outcome the error, whose traceback leads to this frame

    async def _outcome(self, read: Read, deadline_s: float) -> tuple[int, bool]:
        # What is raised after it has no TimeoutError as context: that knows the task, and the task the error.
        nbytes = read.export.nbytes
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    return await shielded(read.outcome)
        finally:
            del read  # as in `_fill`
        self.timed_out += 1
        raise TransferTimeoutError(
            f"a READ of {nbytes} bytes had not settled after {deadline_s:g} s; ask another encode worker"
        )

    def _judge(self, reservation: Reservation, export: Export, found: int, *, finite: bool) -> None:
        """Abandon the reservation and raise unless the bytes have the export's checksum and are finite."""
        if found != export.checksum:
            self.corrupt += 1
            reservation.abandon()
            raise ChecksumMismatchError(
                f"{export.nbytes} bytes arrived with another checksum than they were exported with: the READ "
                "came after the exporter's lease had timed out, or memory is damaged; ask for it again"
            )
        if not finite:
            self.not_finite += 1
            reservation.abandon()
            raise InvalidEmbeddingError(
                "the embedding holds NaN or infinite values: the vision tower overflowed on this item"
            )

    def _end_unfilled(
        self, reservation: Reservation, peer: PeerMetadata, token: str, read: Read | None
    ) -> None:
        """Abandon the reservation, or quarantine it as long as bytes may still arrive."""
        if read is not None:
            read.leave()
            read.outcome.cancel()  # if it is still queued, it never begins, and has settled
        if read is None or read.settled.done():
            reservation.abandon()
            if read is None or not read.posted:
                self.release(peer, token)
            return
        reservation.quarantine()
        logger.warning("a READ of %d bytes has not settled: its extent is in quarantine", read.export.nbytes)
        read.settled.add_done_callback(lambda _: reservation.settle())

    # The agent thread calls these.

    def poll(self, nixl: Any) -> float:
        """Take READs further and settle those that ended."""
        return self._table.poll(nixl)

    def on_notification(self, sender: str, message: bytes) -> None:
        """Ignore it: a reader gets none, what comes belongs to an exporter in the same process."""

    def is_busy(self) -> bool:
        """Whether a READ is in flight."""
        return self._table.is_busy()

    def on_closing(self) -> None:
        """Let the agent be destroyed unless a READ is in flight."""
        self._table.on_closing()

    def on_closed(self) -> None:
        """Answer those that wait for what the agent's end cut off."""
        self._table.on_closed()


def _log_failure(told: Future[None]) -> None:
    if not told.cancelled() and (error := told.exception()) is not None:
        logger.debug("an exporter could not be told that no READ of its export will come: %s", error)
