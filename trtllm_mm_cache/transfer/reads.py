"""The READs in flight. Lives on the agent thread.

When memory is free again was measured with NIXL 1.5 and a frozen peer, over TCP: neither
`release_xfer_handle` nor `remove_remote_agent` stops a READ; after either one the bytes still came when the
peer woke up. So a READ has settled only when NIXL reports its handle done or failed, and until then its
handle is not released, its peer is not removed, and the agent is not destroyed.

NIXL may forget a peer by itself. Of a READ in flight it then says nothing more, also when the peer was added
again meanwhile (measured: "invalidated or re-registered during transfer"), though its bytes still come. Such
a READ never settles: its extent is lost until the process ends. The peer is not: the next READ connects anew.

A READ goes in chunks, one handle each, two in flight at a time. What has arrived is checked in order, here,
while the next are under way: over TCP the checks wait for the wire, not the wire for them; over shared memory
NIXL copies a chunk inside `transfer`, and it is checked while in the processor's cache. Nothing is handed to
another thread between post and verdict. The ack is sent when the last byte is here; of a READ that its caller
has left no further chunk is asked for.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterable
from typing import Any

from trtllm_mm_cache.errors import PeerLostError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer.environment import NixlLibrary
from trtllm_mm_cache.transfer.finite import Pass
from trtllm_mm_cache.transfer.messages import RELEASE, PeerMetadata
from trtllm_mm_cache.transfer.peers import Peer, Peers
from trtllm_mm_cache.transfer.pump import HURRIED_POLL_S, IDLE_POLL_S
from trtllm_mm_cache.transfer.read import Chunk, Read

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 1024**2
"""See docs/decisions.md: smaller ones cost more over TCP than what they hide."""

IN_FLIGHT = 2
"""Chunks asked for at once: the others would share the wire with the next to be checked, and all end late."""

_FORGOTTEN = "the connection to the encode worker was lost; ask again, or another one"


class ReadTable:
    """READs in flight of one NIXL agent, from at most `max_peers` peers.

    All methods belong to the agent thread; the properties are thread-safe.
    """

    def __init__(self, library: NixlLibrary, max_peers: int) -> None:
        self._library = library
        self._peers = Peers(library, max_peers)
        self._reads: list[Read] = []
        self.completed = 0
        self.completed_bytes = 0
        self.failed = 0

    def post(self, nixl: Any, read: Read) -> None:
        """Hand a READ to NIXL; `poll` completes its futures.

        Raises, with nothing begun: `TransferTimeoutError` when its deadline is over or an earlier READ from
        its peer is overdue, `PeerLostError` when the peer cannot be reached, `TransferError` when a range
        is not registered.
        """
        if time.monotonic() >= read.deadline:
            raise TransferTimeoutError("the READ's deadline passed before its turn came: others were first")
        peer = self._connected(nixl, read.peer)
        read.waiting.extend(self._chunks(nixl, read, peer))
        read.check = Pass(read.local_address, read.export.nbytes, read.finite_dtype)
        read.connection = peer
        peer.in_flight += 1
        self._reads.append(read)
        self._ask(nixl, read)

    def notify(self, nixl: Any, metadata: PeerMetadata, message: bytes) -> None:
        """Tell the exporter what `messages` says of notifications. Raises what `post` raises."""
        peer = self._connected(nixl, metadata)
        try:
            nixl.send_notif(peer.name, message)
        except self._library.errors as error:
            self._peers.lose(nixl, peer)
            raise self._peers.failure(error) from error

    def poll(self, nixl: Any) -> float:
        """Take every READ in flight one chunk further and settle what is done; return as `Side.poll`."""
        pace = IDLE_POLL_S
        for read in tuple(self._reads):
            if read.connection is not None and read.check is not None and not read.is_forgotten:
                pace = min(pace, self._advance(nixl, read, read.connection, read.check))
        return pace

    def is_busy(self) -> bool:
        """Whether a READ is in flight whose end NIXL can still report."""
        return any(not read.is_forgotten for read in self._reads)

    def on_closing(self) -> None:
        """Keep the agent from being destroyed while a READ is in flight, also at the interpreter's end.

        That would disconnect in the middle of the READ, and over TCP UCX then aborts the exporter: 24 of 24
        times when it was frozen meanwhile, 7 of 72 while it was serving. So the handle, and with it the
        agent, stays as it is until the process ends; without calls into NIXL it does nothing.
        """
        for read in self._reads:
            for chunk in read.in_flight:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(chunk.handle))

    def on_closed(self) -> None:
        """Fail the READs in flight: nothing will be known of them."""
        for read in self._reads:
            read.complete(
                TransferError("the NIXL agent was closed while this READ was in flight; transfers are over"),
            )

    @property
    def in_flight(self) -> int:
        """READs that have not settled."""
        return len(self._reads)

    @property
    def unsettled(self) -> int:
        """READs in flight that are past their deadline, or of which NIXL will report no end."""
        now = time.monotonic()
        return sum(read.deadline <= now or read.is_forgotten for read in tuple(self._reads))

    @property
    def peers(self) -> int:
        """Connected exporters."""
        return len(self._peers)

    def _chunks(self, nixl: Any, read: Read, peer: Peer) -> list[Chunk]:
        """Make the handles of a READ, all before the first is used: NIXL looks at the ranges here."""
        chunks: list[Chunk] = []
        export = read.export
        try:
            for start in range(0, export.nbytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, export.nbytes - start)
                local = nixl.get_xfer_descs([(read.local_address + start, nbytes, 0)], "DRAM")
                remote = nixl.get_xfer_descs([(export.address + start, nbytes, 0)], "DRAM")
                chunks.append(Chunk(nixl.initialize_xfer("READ", local, remote, peer.name), nbytes))
        except self._library.errors as error:
            self._release(chunks)
            if not nixl.check_remote_metadata(peer.name):
                self._note_forgotten(peer)
                raise PeerLostError(_FORGOTTEN) from error
            raise TransferError(
                f"NIXL refuses a READ of {export.nbytes} bytes ({error}): "
                "the source or the target is not in registered memory"
            ) from error
        return chunks

    def _ask(self, nixl: Any, read: Read) -> None:
        """Ask for the chunks that wait; where NIXL copies within the call, for one, to be checked next."""
        while read.waiting and len(read.in_flight) < IN_FLIGHT and not read.is_unwanted:
            chunk = read.waiting.popleft()
            read.in_flight.append(chunk)
            try:
                state = nixl.transfer(chunk.handle)
            except self._library.errors as error:
                # Part of it may be under way: only the handle's state tells, which is looked at next.
                read.error = self._peers.failure(error)
                return
            if state == "DONE":
                return

    def _advance(self, nixl: Any, read: Read, peer: Peer, check: Pass) -> float:
        """Take note of what has arrived, check a chunk of it, ask for more; settle where nothing is left."""
        arrived_before = read.arrived_bytes
        self._note_arrived(nixl, read, peer)
        if read.is_forgotten:
            return IDLE_POLL_S
        if peer.forgotten:
            read.error = read.error or PeerLostError(_FORGOTTEN)  # nothing of it is in flight
        whole = read.arrived_bytes == read.export.nbytes
        if whole and arrived_before < read.arrived_bytes:
            self._peers.tell(nixl, peer, read.export.token.encode())
        if not read.is_unwanted:
            check.advance(min(CHUNK_BYTES, read.arrived_bytes - check.checked))
            self._ask(nixl, read)
        done = read.is_unwanted or check.checked == read.export.nbytes
        if done and not read.in_flight:
            self._settle(nixl, read, peer, check)
            return IDLE_POLL_S
        if arrived_before < read.arrived_bytes or check.checked < read.arrived_bytes:
            return 0.0
        return HURRIED_POLL_S if read.deadline > time.monotonic() else IDLE_POLL_S

    def _note_arrived(self, nixl: Any, read: Read, peer: Peer) -> None:
        """Take the chunks off that have ended, in their order: a later one's end is seen in its turn."""
        while read.in_flight and self._has_ended(nixl, read, read.in_flight[0], peer):
            chunk = read.in_flight.popleft()
            self._release([chunk])
            if read.error is None:
                read.arrived_bytes += chunk.nbytes

    def _has_ended(self, nixl: Any, read: Read, chunk: Chunk, peer: Peer) -> bool:
        try:
            state = nixl.check_xfer_state(chunk.handle)
        except self._library.not_found:
            logger.exception(
                "NIXL forgot an encode worker with %d READs in flight; their extents stay in quarantine",
                peer.in_flight,
            )
            self._note_forgotten(peer)
            return False
        except self._library.errors as error:
            read.error = read.error or self._peers.failure(error)
            return True
        if state == "PROC":
            return False
        if state != "DONE":
            read.error = read.error or TransferError(
                f"NIXL reports a READ of {read.export.nbytes} bytes as failed"
            )
        return True

    def _release(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            try:
                chunk.handle.release()
            except self._library.errors:
                logger.warning(
                    "NIXL did not release a READ's handle; it is released with the agent", exc_info=True
                )

    def _settle(self, nixl: Any, read: Read, peer: Peer, check: Pass) -> None:
        self._reads.remove(read)
        self._release(read.waiting)
        peer.in_flight -= 1
        if read.error is not None:
            self.failed += 1
            peer.lost = True  # the next READ starts afresh
        elif read.arrived_bytes == read.export.nbytes:
            self.completed += 1
            self.completed_bytes += read.export.nbytes
        else:
            self._peers.tell(nixl, peer, RELEASE + read.export.token.encode())
            read.error = TransferError("a READ was cut off in the middle: its caller had left")
        if peer.lost and peer.in_flight == 0 and not peer.forgotten:
            self._peers.remove(nixl, peer)
        read.settled.set_result(None)  # first, so that the caller finds it so
        read.complete(read.error, (check.checksum, check.finite))

    def _note_forgotten(self, peer: Peer) -> None:
        """Fail the READs of a peer that NIXL has removed; the next one connects to it anew."""
        self._peers.forget(peer)
        for read in self._reads:
            if read.connection is peer and read.in_flight:
                self.failed += 1
                read.complete(PeerLostError(_FORGOTTEN))

    def _connected(self, nixl: Any, metadata: PeerMetadata) -> Peer:
        peer = self._peers.connected(nixl, metadata)
        now = time.monotonic()
        if any(read.connection is peer and read.deadline <= now for read in self._reads):
            # Each further READ would only tie up another extent.
            raise TransferTimeoutError("an earlier READ from this encode worker is overdue; ask another one")
        return peer
