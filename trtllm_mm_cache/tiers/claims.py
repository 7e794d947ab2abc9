"""Who is about to fill which key, and who waits for it: single flight where the filling is part of a request.

A flight (`cache/flight.py`) is a task that nobody's cancellation stops. Here the embedding comes about inside
the answer to one request, which may be cancelled or may not bring it: then those who wait must go on by
themselves, all at once or one of them first.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.own_tower import PreparedItem

Landing = Lease | Literal["again", "alone"]
"""What those who wait get: a lease of their own; or that there will be no embedding. `again`: one of them is
to claim the key; `alone`: each is to have it encoded for itself, for a next one would not be kept either."""


class Claim:
    """One request's undertaking to fill one key. For use from one event loop.

    `media` or, once it is there, `prepared` is what whoever waits needs to go on by itself: those who wait
    hold nothing of their own.
    """

    def __init__(self, claims: Claims, key: str, media: bytes) -> None:
        self._claims = claims
        self._key = key
        self.media = media
        self.prepared: PreparedItem | None = None
        self._waiters: set[asyncio.Future[Landing]] = set()

    async def wait(self) -> Landing:
        """Return how it ended; raises what it ended by. A lease is the caller's."""
        waiter: asyncio.Future[Landing] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        self._claims.waiters += 1
        self._claims.joined += 1
        try:
            return await waiter
        except asyncio.CancelledError:
            # The lease may have come in this very turn; no one else will look at it.
            came = waiter.done() and not waiter.cancelled() and waiter.exception() is None
            if came and isinstance(landing := waiter.result(), Lease):
                landing.release()
            raise
        finally:
            self._waiters.discard(waiter)
            self._claims.waiters -= 1
            del waiter  # an exception that passes here keeps this frame, and the future the exception

    def land(self, lease: Lease) -> None:
        """End it: the embedding is in the cache. `lease` stays the caller's."""
        for waiter in self._end():
            waiter.set_result(lease.clone())

    def leave(self, landing: Literal["again", "alone"]) -> None:
        """End it without an embedding. Idempotent, and does nothing after `land` or `fail`."""
        if self._is_open:
            self._claims.cancelled += 1
        for waiter in self._end():
            waiter.set_result(landing)

    def fail(self, error: Exception) -> None:
        """End it by an error that is the item's own: whoever waits has the same item."""
        self._claims.failed += 1
        for waiter in self._end():
            waiter.set_exception(error)

    @property
    def _is_open(self) -> bool:
        return self._claims.get(self._key) is self

    def _end(self) -> list[asyncio.Future[Landing]]:
        if not self._is_open:
            return []
        self._claims._forget(self._key)
        return [waiter for waiter in self._waiters if not waiter.done()]


class Claims:
    """The claims of one worker by key. For use from one event loop; the counts may be read from any thread.

    The counts are named as in `SingleFlight`; `cancelled` are claims that ended without an embedding.
    """

    def __init__(self) -> None:
        self._open: dict[str, Claim] = {}
        self.started = self.joined = self.failed = self.cancelled = self.waiters = 0

    @property
    def in_flight(self) -> int:
        """Keys that are claimed."""
        return len(self._open)

    def get(self, key: str) -> Claim | None:
        """Return the claim on a key, if there is one."""
        return self._open.get(key)

    def start(self, key: str, media: bytes) -> Claim:
        """Claim a key that is not claimed."""
        self.started += 1
        claim = self._open[key] = Claim(self, key, media)
        return claim

    def close(self, error: Exception) -> None:
        """End all of them by `error`."""
        for claim in list(self._open.values()):
            claim.fail(error)

    def _forget(self, key: str) -> None:
        del self._open[key]
