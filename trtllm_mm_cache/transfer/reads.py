"""The READs in flight and the peers they read from. Lives on the agent thread.

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
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from trtllm_mm_cache.errors import MmCacheError, PeerLostError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer.environment import NixlLibrary
from trtllm_mm_cache.transfer.finite import Pass
from trtllm_mm_cache.transfer.messages import RELEASE, Export, PeerMetadata
from trtllm_mm_cache.transfer.pump import HURRIED_POLL_S, IDLE_POLL_S

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 1024**2
"""See docs/decisions.md: smaller ones cost more over TCP than what they hide."""

IN_FLIGHT = 2
"""Chunks asked for at once: the others would share the wire with the next to be checked, and all end late."""

_FORGOTTEN = "the connection to the encode worker was lost; ask again, or another one"


class _Chunk:
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
        self.waiting: deque[_Chunk] = deque()  # not asked for yet
        self.in_flight: deque[_Chunk] = deque()
        self.arrived_bytes = 0
        self.check: Pass | None = None
        self.connection: _Peer | None = None
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


def _settle_unless_posted(reference: weakref.ref[Read], outcome: Future[tuple[int, bool]]) -> None:
    read = reference()
    if read is not None and not read.posted:
        read.settled.set_result(None)


class _Peer:
    """One connection to an exporter.

    `lost`: a READ failed; it is removed as soon as none is in flight. `forgotten`: NIXL has removed it, and
    will not report the end of its READs.
    """

    def __init__(self, metadata: PeerMetadata) -> None:
        self.name = metadata.agent_name
        self.digest = metadata.digest
        self.in_flight = 0
        self.lost = False
        self.forgotten = False


class ReadTable:
    """READs in flight and connected peers of one NIXL agent.

    All methods belong to the agent thread; the properties are thread-safe. A peer that comes when there are
    `max_peers` displaces the idle one that was read from longest ago.
    """

    def __init__(self, library: NixlLibrary, max_peers: int) -> None:
        self._library = library
        self._max_peers = max_peers
        self._peers: dict[str, _Peer] = {}  # least recently used first
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
            self._lose(nixl, peer)
            raise self._failure(error) from error

    def poll(self, nixl: Any) -> float:
        """Take every READ in flight one chunk further and settle what is done; return as `Side.poll`."""
        pace = IDLE_POLL_S
        for read in tuple(self._reads):
            if read.connection is not None and read.check is not None and not _is_forgotten(read):
                pace = min(pace, self._advance(nixl, read, read.connection, read.check))
        return pace

    def is_busy(self) -> bool:
        """Whether a READ is in flight whose end NIXL can still report."""
        return any(not _is_forgotten(read) for read in self._reads)

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
            _complete(
                read,
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
        return sum(read.deadline <= now or _is_forgotten(read) for read in tuple(self._reads))

    @property
    def peers(self) -> int:
        """Connected exporters."""
        return len(self._peers)

    def _chunks(self, nixl: Any, read: Read, peer: _Peer) -> list[_Chunk]:
        """Make the handles of a READ, all before the first is used: NIXL looks at the ranges here."""
        chunks: list[_Chunk] = []
        export = read.export
        try:
            for start in range(0, export.nbytes, CHUNK_BYTES):
                nbytes = min(CHUNK_BYTES, export.nbytes - start)
                local = nixl.get_xfer_descs([(read.local_address + start, nbytes, 0)], "DRAM")
                remote = nixl.get_xfer_descs([(export.address + start, nbytes, 0)], "DRAM")
                chunks.append(_Chunk(nixl.initialize_xfer("READ", local, remote, peer.name), nbytes))
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
        while read.waiting and len(read.in_flight) < IN_FLIGHT and not _is_unwanted(read):
            chunk = read.waiting.popleft()
            read.in_flight.append(chunk)
            try:
                state = nixl.transfer(chunk.handle)
            except self._library.errors as error:
                # Part of it may be under way: only the handle's state tells, which is looked at next.
                read.error = self._failure(error)
                return
            if state == "DONE":
                return

    def _advance(self, nixl: Any, read: Read, peer: _Peer, check: Pass) -> float:
        """Take note of what has arrived, check a chunk of it, ask for more; settle where nothing is left."""
        arrived_before = read.arrived_bytes
        self._note_arrived(nixl, read, peer)
        if _is_forgotten(read):
            return IDLE_POLL_S
        whole = read.arrived_bytes == read.export.nbytes
        if whole and arrived_before < read.arrived_bytes:
            self._tell(nixl, peer, read.export.token.encode())
        if not _is_unwanted(read):
            check.advance(min(CHUNK_BYTES, read.arrived_bytes - check.checked))
            self._ask(nixl, read)
        done = _is_unwanted(read) or check.checked == read.export.nbytes
        if done and not read.in_flight:
            self._settle(nixl, read, peer, check)
            return IDLE_POLL_S
        if arrived_before < read.arrived_bytes or check.checked < read.arrived_bytes:
            return 0.0
        return HURRIED_POLL_S if read.deadline > time.monotonic() else IDLE_POLL_S

    def _note_arrived(self, nixl: Any, read: Read, peer: _Peer) -> None:
        """Take the chunks off that have ended, in their order: a later one's end is seen in its turn."""
        while read.in_flight and self._has_ended(nixl, read, read.in_flight[0], peer):
            chunk = read.in_flight.popleft()
            self._release([chunk])
            if read.error is None:
                read.arrived_bytes += chunk.nbytes

    def _has_ended(self, nixl: Any, read: Read, chunk: _Chunk, peer: _Peer) -> bool:
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
            read.error = read.error or self._failure(error)
            return True
        if state == "PROC":
            return False
        if state != "DONE":
            read.error = read.error or TransferError(
                f"NIXL reports a READ of {read.export.nbytes} bytes as failed"
            )
        return True

    def _release(self, chunks: Iterable[_Chunk]) -> None:
        for chunk in chunks:
            try:
                chunk.handle.release()
            except self._library.errors:
                logger.warning(
                    "NIXL did not release a READ's handle; it is released with the agent", exc_info=True
                )

    def _tell(self, nixl: Any, peer: _Peer, message: bytes) -> None:
        """Send what the exporter can do without: its lease times out."""
        try:
            nixl.send_notif(peer.name, message)
        except self._library.errors as error:
            logger.debug("an exporter could not be told of a READ's end: %s", error)
            peer.lost = True  # removed with its last READ; the next one starts afresh

    def _settle(self, nixl: Any, read: Read, peer: _Peer, check: Pass) -> None:
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
            self._tell(nixl, peer, RELEASE + read.export.token.encode())
            read.error = TransferError("a READ was cut off in the middle: its caller had left")
        if peer.lost and peer.in_flight == 0:
            self._remove(nixl, peer)
        read.settled.set_result(None)  # first, so that the caller finds it so
        _complete(read, read.error, (check.checksum, check.finite))

    def _note_forgotten(self, peer: _Peer) -> None:
        """Fail the READs of a peer that NIXL has removed; the next one connects to it anew."""
        peer.lost = peer.forgotten = True
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        for read in self._reads:
            if read.connection is peer and read.in_flight:
                self.failed += 1
                _complete(read, PeerLostError(_FORGOTTEN))

    def _failure(self, error: Exception) -> MmCacheError:
        if isinstance(error, self._library.disconnected):
            return PeerLostError("the encode worker that exported the embedding is gone; ask another one")
        return TransferError(f"the READ of an embedding failed ({error}); ask for it again")

    def _connected(self, nixl: Any, metadata: PeerMetadata) -> _Peer:
        peer = self._peers.pop(metadata.agent_name, None)
        if peer is None:
            self._make_room(nixl)
            peer = self._connect(nixl, metadata)
        self._peers[peer.name] = peer  # now the most recently used
        if peer.digest != metadata.digest:
            raise TransferError("a peer's NIXL metadata changed under the same agent name; it must not")
        if peer.lost:
            raise PeerLostError("the connection to the encode worker was lost; ask another one")
        now = time.monotonic()
        if any(read.connection is peer and read.deadline <= now for read in self._reads):
            # Each further READ would only tie up another extent.
            raise TransferTimeoutError("an earlier READ from this encode worker is overdue; ask another one")
        return peer

    def _connect(self, nixl: Any, metadata: PeerMetadata) -> _Peer:
        try:
            added = nixl.add_remote_agent(metadata.metadata)
        except self._library.errors as error:
            raise PeerLostError(
                f"the exporting encode worker cannot be reached ({error}); ask another one"
            ) from error
        name = added.decode() if isinstance(added, bytes) else added
        if name != metadata.agent_name:
            if name not in self._peers:
                nixl.remove_remote_agent(name)
            raise TransferError("the peer's NIXL metadata belongs to another agent than it says")
        return _Peer(metadata)

    def _make_room(self, nixl: Any) -> None:
        if len(self._peers) < self._max_peers:
            return
        idle = next((peer for peer in self._peers.values() if peer.in_flight == 0), None)
        if idle is not None:
            self._remove(nixl, idle)

    def _lose(self, nixl: Any, peer: _Peer) -> None:
        """Give no more READs to a connection that has failed; remove it with its last one."""
        peer.lost = True
        if peer.in_flight == 0:
            self._remove(nixl, peer)

    def _remove(self, nixl: Any, peer: _Peer) -> None:
        self._peers.pop(peer.name, None)
        try:
            nixl.remove_remote_agent(peer.name)
        except self._library.errors:
            logger.warning("NIXL did not remove a peer", exc_info=True)


def _is_forgotten(read: Read) -> bool:
    """Whether a chunk is in flight whose end NIXL will not report."""
    return read.connection is not None and read.connection.forgotten and bool(read.in_flight)


def _is_unwanted(read: Read) -> bool:
    return read.is_left or read.error is not None


def _complete(read: Read, error: MmCacheError | None, found: tuple[int, bool] = (0, False)) -> None:
    if read.outcome.done():
        return
    if error is None:
        read.outcome.set_result(found)
    else:
        read.outcome.set_exception(error)
