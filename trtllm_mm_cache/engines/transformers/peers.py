"""A rank's connections to other ranks, and the end of its process when one of them is gone.

The ranks of a worker live and die together: when one is lost (killed, out of memory, frozen past a
deadline), or fails where the others do not, nothing can be computed any more, and gloo would let the
others wait for its part of a sum. So each rank reads its connections in a thread of their own: an
end-of-file that was not announced ends the process at once, with status 1, and so do the others', and
mpirun stops what is left. The rank that finds out says so in one line; those that it can still reach
end without one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, cast

logger = logging.getLogger(__name__)

EXIT_LOST = 1
"""Status of a process that ends because another rank has."""

_LOST = "lost"
"""Message: the sender ends, and has said why."""

# gloo's connection to a dead rank can end well before ours: its files are closed one by one.
_NOTICE_S = 3.0
_FAREWELL_S = 0.2
_PARENT_PERIOD_S = 1.0


class Peers:
    """Rank `rank`'s connections, by the rank at the other end. Of the messages, None announces the end.

    Thread-safe. Rank 0 is connected to all others, and they to it alone.
    """

    def __init__(self, rank: int, connections: Mapping[int, Connection]) -> None:
        self._rank = rank
        self._connections = dict(connections)
        # No SimpleQueue: CPython's was seen to wait for ever with a timeout (see transfer/pump.py).
        self._messages: queue.Queue[Any] = queue.Queue()
        self._ending = threading.Event()
        self._sending = threading.Lock()
        self._losing = threading.Lock()
        self._mpirun = os.getppid()
        self._reader = threading.Thread(target=self._read, name="read-ranks", daemon=True)
        self._reader.start()

    def __len__(self) -> int:
        return len(self._connections)

    def send(self, message: Any) -> None:
        """Send to every peer. Does not return when one is gone unannounced."""
        for peer, connection in self._connections.items():
            try:
                with self._sending:
                    connection.send(message)
            except OSError:
                if not self._ending.is_set():
                    self._lose_peer(peer)

    def receive(self, deadline_s: float | None = None) -> Any:
        """Wait for the next message of any peer. Does not return when none comes before the deadline."""
        try:
            return self._messages.get(timeout=deadline_s)
        except queue.Empty:
            self.lose(f"no word from another rank for {deadline_s} s")

    def announce_end(self) -> None:
        """Tell every peer that it is over: from now on they may be gone. Idempotent."""
        if self._ending.is_set():
            return
        self._ending.set()
        self.send(None)

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until every peer has ended; False when one has not in time."""
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def fail(self, what: str) -> NoReturn:
        """End the process because its computation broke off, which a lost peer may be the reason for."""
        self.wait_gone(_NOTICE_S)  # does not return when a peer was lost
        self.lose(f"rank {self._rank} failed: {what}")

    def lose(self, what: str) -> NoReturn:
        """Say why nothing can be computed any more, and end the process and the other ranks' at once."""
        self._end(what)

    def _lose_peer(self, peer: int) -> NoReturn:
        # Each of the others sees rank 0 go: one of them says so.
        what = f"rank {peer} is gone (its output, or the system's log, says why)"
        self._end(what if self._rank <= 1 else None)

    def _end(self, what: str | None) -> NoReturn:
        with self._losing:  # never released: a second thread waits here while the first ends the process
            if what is not None:
                logger.critical("%s; all ranks of the PD worker end", what)
            if self._sending.acquire(timeout=_FAREWELL_S):
                for connection in self._connections.values():
                    with contextlib.suppress(OSError):  # that is the one
                        connection.send(_LOST)
            os._exit(EXIT_LOST)

    def _read(self) -> None:
        peers = {connection: peer for peer, connection in self._connections.items()}
        while peers:
            if self._rank == 0 and os.getppid() != self._mpirun:
                self.lose("mpirun is gone")
            for ready in wait(list(peers), timeout=_PARENT_PERIOD_S):
                connection = cast(Connection, ready)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    peer = peers.pop(connection)
                    if not self._ending.is_set():
                        self._lose_peer(peer)
                else:
                    if message == _LOST:
                        self._end(None)
                    if message is None:
                        self._ending.set()
                    self._messages.put(message)
