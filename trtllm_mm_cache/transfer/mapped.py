"""The PD side on the encode worker's own machine: the exporter's arena is mapped and copied from.

A READ over shared memory costs three memcpys before any check, since the kernel pins the exporter's pages one
by one. A reader that has the exporter's arena mapped copies, hashes and looks for NaN in one pass. Everything
else is as for a READ: the exporter's lease holds until the same notification, and nothing is visible before
it is checked. Where an arena cannot be mapped, the READ is NIXL's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any

from prometheus_client.core import Metric

from trtllm_mm_cache.cache.arena.place import MappedArena, this_machine
from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.errors import SharedMemoryError, TransferError, TransferTimeoutError
from trtllm_mm_cache.observability.metrics import counter, gauge
from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.finite import checksum_and_finite
from trtllm_mm_cache.transfer.messages import Export, PeerMetadata
from trtllm_mm_cache.transfer.reader import DEFAULT_MAX_PEERS, Reader

logger = logging.getLogger(__name__)

_ORPHANS_LOOKED_FOR_EACH_S = 1.0


class MappedReader(Reader):
    """A `Reader` that copies from the arenas of exporters on this machine, and READs from all others.

    An arena is mapped at the first read from it, and let go when its process is gone, whose memory the
    mapping would keep; of arenas that cannot be mapped the log says why, once. At most `max_peers` are kept.

    `mapped` reads were copies, of `mapped_bytes` in all; `completed` and `completed_bytes` count them too.
    """

    def __init__(self, agent: TransferAgent, *, max_peers: int = DEFAULT_MAX_PEERS) -> None:
        self._arenas: dict[str, MappedArena | None] = {}  # by identity, the oldest first; None: cannot be
        self._max_arenas = max_peers
        self._copying: set[object] = set()
        self._acks: deque[tuple[PeerMetadata, bytes]] = deque()  # sent by `poll`, also while the agent ends
        self._looked_at = 0.0
        self.mapped = self.mapped_bytes = 0
        super().__init__(agent, max_peers=max_peers)

    @property
    def completed(self) -> int:
        """READs and copies that brought their bytes."""
        return super().completed + self.mapped

    @property
    def completed_bytes(self) -> int:
        """Bytes that they brought."""
        return super().completed_bytes + self.mapped_bytes

    @property
    def in_flight(self) -> int:
        """READs that have not settled, and copies under way."""
        return super().in_flight + len(self._copying)

    @property
    def arenas(self) -> int:
        """Arenas that are mapped."""
        return sum(arena is not None for arena in tuple(self._arenas.values()))

    def collect(self) -> Iterable[Metric]:
        """Yield what a `Reader` does, and how much of it was copied."""
        yield from super().collect()
        yield counter("mapped_reads", "Embeddings copied from a mapped arena, among the reads.", self.mapped)
        yield gauge("mapped_arenas", "Encode workers' arenas that are mapped.", self.arenas)

    async def read_into(
        self,
        reservation: Reservation,
        peer: PeerMetadata,
        export: Export,
        *,
        deadline_s: float,
        finite_dtype: str | None = None,
    ) -> None:
        """See `Reader.read_into`; what is cut off ends within milliseconds, and then its extent is free.

        The bytes are there as long as the mapping is: an exporter that died after its answer, or is frozen,
        is read from all the same.
        """
        arena = self._arena_of(peer)
        if arena is None:
            await super().read_into(
                reservation, peer, export, deadline_s=deadline_s, finite_dtype=finite_dtype
            )
            return
        self._check_size(reservation, peer, export)
        if not self._agent.is_alive:
            reservation.abandon()
            raise TransferError("the NIXL agent of this process is closed; transfers are over")
        await self._copy(arena, reservation, peer, export, deadline_s, finite_dtype)

    async def _copy(
        self,
        arena: MappedArena,
        reservation: Reservation,
        peer: PeerMetadata,
        export: Export,
        deadline_s: float,
        finite_dtype: str | None,
    ) -> None:
        acknowledge = partial(self._acks.append, (peer, export.token.encode()))
        try:
            source = arena.local(export.address, export.nbytes)
        except SharedMemoryError as error:
            reservation.abandon()
            acknowledge()
            raise TransferError(f"{error.message}: it is not in registered memory") from None
        work = partial(_copied, arena, reservation.address, export.nbytes, finite_dtype, source)

        def cut_off() -> None:
            reservation.abandon()
            acknowledge()
            self._copying.discard(work)

        self._copying.add(work)
        # What is raised after it has no TimeoutError as context: that knows the task, and the task the error.
        result: tuple[int, bool] | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                result = await self._agent.checksums.run(work, export.nbytes, release=cut_off)
        if result is None:
            self.timed_out += 1
            raise TransferTimeoutError(
                f"a copy of {export.nbytes} bytes was not done after {deadline_s:g} s; ask again"
            )
        acknowledge()
        self._copying.discard(work)
        self.mapped += 1
        self.mapped_bytes += export.nbytes
        self._judge(reservation, export, result[0], finite=result[1])

    def _arena_of(self, peer: PeerMetadata) -> MappedArena | None:
        """Return the mapping of the peer's arena, or None where the READ is NIXL's."""
        place = peer.arena
        if place is None or place.machine != this_machine():
            return None
        if place.identity not in self._arenas:
            arena: MappedArena | None = None
            try:
                arena = MappedArena(place)
                Thread(target=arena.populate, name="map-arena", daemon=True).start()
            except SharedMemoryError as error:
                logger.warning(
                    "the arena of an encode worker on this machine is not mapped, and read by NIXL: %s",
                    error.message,
                )
            while len(self._arenas) >= self._max_arenas:
                self._arenas.pop(next(iter(self._arenas)), None)
            self._arenas[place.identity] = arena
        known = self._arenas.get(place.identity)
        return known if known is not None and known.place == place else None

    def is_busy(self) -> bool:
        """Whether a READ is in flight, or a copy whose exporter is to be told."""
        return bool(self._copying or self._acks) or super().is_busy()

    def poll(self, nixl: Any) -> float:
        """Settle READs that ended, tell exporters of copies, let go of arenas whose process is gone."""
        while self._acks:
            peer, token = self._acks.popleft()
            try:
                self._table.notify(nixl, peer, token)
            except TransferError as error:
                logger.debug("an exporter could not be told of a copy's end: %s", error)
        now = time.monotonic()
        if now - self._looked_at > _ORPHANS_LOOKED_FOR_EACH_S:
            self._looked_at = now
            for identity, arena in tuple(self._arenas.items()):
                if arena is not None and arena.is_orphaned:
                    self._arenas.pop(identity, None)
        return super().poll(nixl)


def _copied(arena: MappedArena, target: int, nbytes: int, dtype: str | None, source: int) -> tuple[int, bool]:
    """Copy and check; the mapping stays at least until then, because this has it."""
    del arena
    return checksum_and_finite(target, nbytes, dtype, source=source)
