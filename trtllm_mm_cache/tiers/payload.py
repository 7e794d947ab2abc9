"""What lies behind an authentic header: read straight into the arena, sealed, finite, within a deadline."""

from __future__ import annotations

import ctypes
import hmac
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidEmbeddingError
from trtllm_mm_cache.tiers.format import HEADER_BYTES, Header, RefusedEntryError, Sealer
from trtllm_mm_cache.tiers.limits import TierLimits
from trtllm_mm_cache.tiers.slots import Slots
from trtllm_mm_cache.tiers.storage import OpenEntry
from trtllm_mm_cache.transfer.finite import PIECE_BYTES, is_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PayloadReader:
    """Reads a tier's payloads, in its `slots`. `watched` times a read and tells the tier's breaker of it."""

    tier: str
    slots: Slots
    limits: TierLimits
    sealer: Sealer
    watched: Callable[[], AbstractContextManager[object]]

    async def read(
        self, opened: OpenEntry, header: Header, reservation: Reservation, *, finite: bool
    ) -> None:
        """Fill `reservation` with the payload of an entry, which is closed then: see `Found.read_into`."""
        if reservation.nbytes != header.nbytes:
            opened.close()
            reservation.abandon()
            raise EmbeddingMismatchError(
                f"{reservation.nbytes} bytes were reserved for an entry of {header.nbytes}"
            )
        left = False

        def leave() -> None:
            nonlocal left
            left = True
            reservation.quarantine()
            logger.warning(
                "tier %s: a read of %d bytes goes on: its extent is in quarantine", self.tier, header.nbytes
            )

        def late(_: Future[None]) -> None:
            opened.close()
            reservation.settle()

        try:
            work = partial(_read_checked, opened, header, reservation.address, self.sealer, finite=finite)
            seconds = self.limits.fetch_s + header.nbytes / self.limits.bytes_per_s
            with self.watched():
                await self.slots.run(work, deadline_s=seconds, leave=leave, late=late)
        except BaseException:
            if not left:
                opened.close()
                reservation.abandon()
            raise
        opened.close()


class StoredEmbedding:
    """`Found`: an entry of a tier whose header is authentic."""

    def __init__(self, reader: PayloadReader, opened: OpenEntry, header: Header) -> None:
        self.nbytes = header.nbytes
        self.dtype = header.dtype
        self.shape = header.shape
        self.metadata = header.metadata
        self.content = header.content
        self._reader = reader
        self._opened = opened
        self._header = header

    async def read_into(self, reservation: Reservation, *, finite: bool) -> None:
        """See `Found.read_into`."""
        await self._reader.read(self._opened, self._header, reservation, finite=finite)

    def release(self) -> None:
        """See `Found.release`."""
        self._opened.close()


def memory_at(address: int, nbytes: int) -> memoryview:
    """Return the bytes at `address`, which must stay mapped for as long as the view is used."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _read_checked(opened: OpenEntry, header: Header, address: int, sealer: Sealer, *, finite: bool) -> None:
    """Read and check piece by piece: every byte comes from memory once."""
    memory = memory_at(address, header.nbytes)
    hasher, all_finite = sealer.payload_hasher(), True
    for start in range(0, header.nbytes, PIECE_BYTES):
        piece = memory[start : start + PIECE_BYTES]
        if opened.read(piece, HEADER_BYTES + start) != len(piece):
            raise RefusedEntryError("an entry ended before its last byte", reason="truncated")
        hasher.update(piece)
        all_finite = all_finite and (not finite or is_finite(piece, header.dtype))
    if not hmac.compare_digest(hasher.digest(), header.payload_seal):
        raise RefusedEntryError("the bytes of an entry are not those that were sealed", reason="damaged")
    if not all_finite:
        raise InvalidEmbeddingError("the embedding holds NaN or infinite values")
