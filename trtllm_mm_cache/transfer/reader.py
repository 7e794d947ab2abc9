"""The PD side: READs an exported embedding into a reserved extent of the arena."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    TransferError,
    TransferTimeoutError,
)
from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.finite import checksum_and_finite
from trtllm_mm_cache.transfer.messages import Export, PeerMetadata
from trtllm_mm_cache.transfer.reads import Read, ReadTable

logger = logging.getLogger(__name__)

DEFAULT_MAX_PEERS = 256


@dataclass(frozen=True)
class ReaderStatistics:
    """Snapshot, at most one poll old.

    `reads` and `read_bytes` count READs that brought their bytes, `failed` those that NIXL reported as
    failed, `timed_out` those not settled at their deadline, `corrupt` those whose checksum disagreed,
    `not_finite` those that brought NaN or infinity where that is refused.
    `in_flight` READs are with NIXL now; `unsettled` of them are past their deadline.
    """

    reads: int
    read_bytes: int
    failed: int
    timed_out: int
    corrupt: int
    not_finite: int
    in_flight: int
    unsettled: int
    peers: int


class Reader:
    """READs from exporters, connecting to each at its first READ.

    A peer is forgotten when a READ from it fails, and when `max_peers` would be exceeded and it is the idle
    one that was read from longest ago; the next READ connects again. While a READ from a peer is overdue, no
    other is begun from it, so that a frozen peer ties up only what was asked of it within one deadline.

    Thread-safe, except that `read_into` belongs to an event loop. Ends with the agent.
    """

    def __init__(self, agent: TransferAgent, *, max_peers: int = DEFAULT_MAX_PEERS) -> None:
        self._agent = agent
        self._table = ReadTable(agent.library, max_peers)
        self._timed_out = 0
        self._corrupt = self._not_finite = 0
        agent.attach(self)

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
        `EmbeddingMismatchError` when the reservation has another size or values are not finite,
        `TransferError` when NIXL refuses.
        """
        if reservation.nbytes != export.nbytes:
            reservation.abandon()
            self.give_up(peer, export.token)
            raise EmbeddingMismatchError(
                f"the encode worker exported {export.nbytes} bytes where {reservation.nbytes} were reserved"
            )
        await self._fill(reservation, peer, export, deadline_s)
        await self._verify(reservation, export, finite_dtype)

    def begin(
        self,
        peer: PeerMetadata,
        *,
        remote_address: int,
        local_address: int,
        nbytes: int,
        token: str,
        deadline_s: float,
    ) -> Read:
        """Start a READ, for callers that account for the memory themselves: see `Read`.

        Its `outcome` fails with the errors of `read_into` that are not about the checksum, but not by the
        deadline once it is in flight. Raises `TransferError` when the agent is closed.
        """
        read = Read(
            peer,
            remote_address=remote_address,
            local_address=local_address,
            nbytes=nbytes,
            token=token,
            deadline=time.monotonic() + deadline_s,
        )
        self._agent.begin(read.outcome, lambda nixl: self._table.post(nixl, read))
        return read

    def give_up(self, peer: PeerMetadata, token: str) -> None:
        """Tell the exporter, some time soon, that nobody will READ the export `token`.

        It then releases its lease at once instead of at its timeout, which is also what remains when it
        cannot be told: a frozen or dead exporter, or a closed agent, is no error here.
        """
        with contextlib.suppress(TransferError):
            told = self._agent.call(lambda nixl: self._table.release(nixl, peer, token))
            told.add_done_callback(_log_failure)

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot."""
        in_flight, overdue, peers = self._table.counts()
        return ReaderStatistics(
            reads=self._table.completed,
            read_bytes=self._table.completed_bytes,
            failed=self._table.failed,
            timed_out=self._timed_out,
            corrupt=self._corrupt,
            not_finite=self._not_finite,
            in_flight=in_flight,
            unsettled=overdue,
            peers=peers,
        )

    async def _fill(
        self, reservation: Reservation, peer: PeerMetadata, export: Export, deadline_s: float
    ) -> None:
        read: Read | None = None
        try:
            read = self.begin(
                peer,
                remote_address=export.address,
                local_address=reservation.address,
                nbytes=export.nbytes,
                token=export.token,
                deadline_s=deadline_s,
            )
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(asyncio.wrap_future(read.outcome))
        except TimeoutError:
            self._timed_out += 1
            self._give_back(reservation, peer, export.token, read)
            raise TransferTimeoutError(
                f"a READ of {export.nbytes} bytes had not settled after {deadline_s:g} s; "
                "ask another encode worker"
            ) from None
        except BaseException:
            self._give_back(reservation, peer, export.token, read)
            raise

    async def _verify(self, reservation: Reservation, export: Export, finite_dtype: str | None) -> None:
        """Look at the bytes in one go: a second hand-over to a thread would take 0.2 ms more."""
        work = partial(checksum_and_finite, reservation.address, reservation.nbytes, finite_dtype)
        found, finite = await self._agent.checksums.run(
            work, reservation.nbytes, give_back=reservation.abandon
        )
        if found != export.checksum:
            self._corrupt += 1
            reservation.abandon()
            raise ChecksumMismatchError(
                f"{export.nbytes} bytes arrived with another checksum than they were exported with: the READ "
                "came after the exporter's lease had timed out, or memory is damaged; ask for it again"
            )
        if not finite:
            self._not_finite += 1
            reservation.abandon()
            raise EmbeddingMismatchError(
                "the embedding holds NaN or infinite values: the vision tower overflowed on this image"
            )

    def _give_back(self, reservation: Reservation, peer: PeerMetadata, token: str, read: Read | None) -> None:
        """Abandon the reservation, or quarantine it as long as bytes may still arrive."""
        if read is not None:
            read.outcome.cancel()  # if it is still queued, it never begins, and has settled
        if read is None or read.settled.done():
            reservation.abandon()
            if read is None or not read.posted:
                self.give_up(peer, token)
            return
        reservation.quarantine()
        logger.warning(
            "a READ of %d bytes is given up and not settled: its extent is in quarantine", read.nbytes
        )
        read.settled.add_done_callback(lambda _: reservation.settle())

    # The agent thread calls these.

    def poll(self, nixl: Any) -> bool:
        """Settle READs that ended."""
        return self._table.poll(nixl)

    def on_notification(self, sender: str, message: bytes) -> None:
        """Nobody notifies a reader: what comes belongs to an exporter in the same process."""

    def is_busy(self) -> bool:
        """Whether a READ is in flight."""
        return self._table.is_busy()

    def let_go(self) -> None:
        """Let the agent be destroyed unless a READ is in flight."""
        self._table.let_go()

    def on_closed(self) -> None:
        """Answer who waits for what the agent's end cut off."""
        self._table.on_closed()


def _log_failure(told: Future[None]) -> None:
    if not told.cancelled() and (error := told.exception()) is not None:
        logger.debug("an exporter could not be told of an export that nobody will READ: %s", error)
