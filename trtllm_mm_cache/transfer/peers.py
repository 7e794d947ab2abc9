"""The exporters that one NIXL agent reads from. Lives on the agent thread."""

from __future__ import annotations

import logging
from typing import Any

from trtllm_mm_cache.errors import MmCacheError, PeerLostError, TransferError
from trtllm_mm_cache.transfer.environment import NixlLibrary
from trtllm_mm_cache.transfer.messages import PeerMetadata

logger = logging.getLogger(__name__)


class Peer:
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


class Peers:
    """Connected exporters. When there are `max_peers`, the idle one used longest ago makes room."""

    def __init__(self, library: NixlLibrary, max_peers: int) -> None:
        self._library = library
        self._max_peers = max_peers
        self._peers: dict[str, Peer] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._peers)

    def connected(self, nixl: Any, metadata: PeerMetadata) -> Peer:
        """Return the connection to an exporter, made if need be. Raises `PeerLostError`, `TransferError`."""
        peer = self._peers.pop(metadata.agent_name, None)
        if peer is None:
            self._make_room(nixl)
            peer = self._connect(nixl, metadata)
        self._peers[peer.name] = peer  # now the most recently used
        if peer.digest != metadata.digest:
            raise TransferError("a peer's NIXL metadata changed under the same agent name; it must not")
        if peer.lost:
            raise PeerLostError("the connection to the encode worker was lost; ask another one")
        return peer

    def tell(self, nixl: Any, peer: Peer, message: bytes) -> None:
        """Send what the exporter can do without: its lease times out."""
        try:
            nixl.send_notif(peer.name, message)
        except self._library.errors as error:
            logger.debug("an exporter could not be told of a READ's end: %s", error)
            peer.lost = True  # removed with its last READ; the next one starts afresh

    def lose(self, nixl: Any, peer: Peer) -> None:
        """Give no more READs to a connection that has failed; remove it with its last one."""
        peer.lost = True
        if peer.in_flight == 0:
            self.remove(nixl, peer)

    def forget(self, peer: Peer) -> None:
        """Note that NIXL has removed it by itself."""
        peer.lost = peer.forgotten = True
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]

    def remove(self, nixl: Any, peer: Peer) -> None:
        """End a connection that no READ uses."""
        self._peers.pop(peer.name, None)
        try:
            nixl.remove_remote_agent(peer.name)
        except self._library.errors:
            logger.warning("NIXL did not remove a peer", exc_info=True)

    def failure(self, error: Exception) -> MmCacheError:
        """Return what a caller is told of what NIXL raised."""
        if isinstance(error, self._library.disconnected):
            return PeerLostError("the encode worker that exported the embedding is gone; ask another one")
        return TransferError(f"the READ of an embedding failed ({error}); ask for it again")

    def _connect(self, nixl: Any, metadata: PeerMetadata) -> Peer:
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
        return Peer(metadata)

    def _make_room(self, nixl: Any) -> None:
        if len(self._peers) < self._max_peers:
            return
        idle = next((peer for peer in self._peers.values() if peer.in_flight == 0), None)
        if idle is not None:
            self.remove(nixl, idle)
