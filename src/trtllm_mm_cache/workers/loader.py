"""Steps 5 to 7 for one missing embedding: ask an encode worker, READ what it exports, commit it.

    5 miss         the encode worker that the key chooses; once more on the next one if that can help; those
                   that are not there any more, though discovery still lists them, are passed over
    6 READ         NIXL reads straight into a reserved extent
    7 commit       only after checksum, size, shape, dtype, rows and values agree

An instance whose breaker is open is passed over. An export that will not be READ is given up at once, so
that it does not stay pinned in the encode worker's arena until its lease times out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ImageDescription
from trtllm_mm_cache.errors import (
    ArenaFullError,
    ChecksumMismatchError,
    EmbeddingMismatchError,
    EncodeError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    EncodeUnreachableError,
    EntryTooLargeError,
    MmCacheError,
    TransferError,
)
from trtllm_mm_cache.observability.pd_metrics import PdMetrics
from trtllm_mm_cache.transfer import Export, PeerMetadata, Reader
from trtllm_mm_cache.workers.breaker import BreakerStatistics, CircuitBreakers
from trtllm_mm_cache.workers.passages import Passage
from trtllm_mm_cache.workers.protocol import ENCODE_SECONDS, EncodeReady, EncodeRequest
from trtllm_mm_cache.workers.threads import in_thread

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_UNCACHED = "resolver (uncached)"


@dataclass(frozen=True)
class MissingImage:
    """One image between lookup and commit. Without `retain` its embedding is for one request alone."""

    key: EmbeddingKey
    media: bytes
    description: ImageDescription
    retain: bool
    passage: Passage

    @property
    def dropped(self) -> bool:
        """Whether a drop concerned it since its request came."""
        return self.passage.dropped(self.key.hex)

    @property
    def retained(self) -> bool:
        """Whether it may be stored, as things are now."""
        return self.retain and not self.dropped


@dataclass(frozen=True)
class LoaderStatistics:
    """Counts since start. `uncached` embeddings were served without entering the cache."""

    retries: int
    uncached: int


class EncodeWorkers(Protocol):
    """The encode workers, as the loader sees them; `EncodeClient` are the real ones."""

    def rank(self, key: EmbeddingKey) -> list[int]:
        """Return the instances that are alive, in the order in which to ask them for `key`."""
        ...

    async def encode(self, instance: int, request: EncodeRequest) -> EncodeReady:
        """Ask one instance for one embedding."""
        ...

    async def close(self) -> None:
        """Stop waiting for answers."""
        ...


EmbeddingCheck = Callable[[ImageDescription, tuple[int, int], torch.dtype, Mapping[str, Any]], None]
"""`Generator.check_embedding`: raises `EmbeddingMismatchError` for what cannot be the image's embedding."""


class EmbeddingLoader:
    """Loads missing embeddings for one PD worker. For use from one event loop.

    `transit` is a manager that retains nothing; it takes what `cache` has no room for, and is the
    same object as `cache` where the capacity is 0. `what_if` is told what enters the cache.
    """

    def __init__(
        self,
        *,
        cache: MultimodalEmbeddingCacheManager,
        transit: MultimodalEmbeddingCacheManager,
        encoders: EncodeWorkers,
        breakers: CircuitBreakers,
        reader: Reader,
        fingerprint: str,
        check: EmbeddingCheck,
        reject_non_finite: bool,
        encode_timeout_s: float,
        transfer_timeout_s: float,
        metrics: PdMetrics | None = None,
        what_if: WhatIf | None = None,
    ) -> None:
        self._cache = cache
        self._transit = transit
        self._encoders = encoders
        self._breakers = breakers
        self._reader = reader
        self._fingerprint = fingerprint
        self._check = check
        self._reject_non_finite = reject_non_finite
        self._encode_timeout_s = encode_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._metrics = metrics or PdMetrics()
        self._what_if = what_if
        self._retries = self._uncached = 0

    def statistics(self) -> LoaderStatistics:
        """Return a snapshot."""
        return LoaderStatistics(self._retries, self._uncached)

    def breakers(self) -> BreakerStatistics:
        """Return a snapshot of the encode workers' breakers."""
        return self._breakers.statistics()

    async def close(self) -> None:
        """Stop waiting for answers that nobody wants."""
        await self._encoders.close()

    # 5 miss
    async def load(self, image: MissingImage) -> Lease:
        """Return a lease on the embedding of `image`, made by an encode worker.

        The first of two attempts gets half of the time, the last one what is left. Raises the last
        attempt's error, `EncodeUnavailableError` at once when no instance is alive or admitted.
        """
        ranked = self._encoders.rank(image.key)
        self._breakers.keep(ranked)
        alone, left = len(ranked) == 1, _ATTEMPTS
        give_up_at = asyncio.get_running_loop().time() + self._encode_timeout_s
        failure: MmCacheError | None = None
        for instance in ranked * _ATTEMPTS if alone else ranked:
            if not self._breakers.admits(instance):
                continue
            if failure is not None:
                self._retries += 1
                logger.warning("embedding %s…: %s; trying once more", image.key.hex[:12], failure.code)
            try:
                with self._breakers.calling(instance):
                    request = self._request(image, fresh=_was_wrong(failure))
                    return await self._attempt(instance, image, request, give_up_at, 1 if alone else left)
            except EncodeUnreachableError as error:
                failure = error  # it took no time and has not seen the image: not an attempt
            except MmCacheError as error:
                failure = error
                left -= 1
                if not left or not _another_attempt_helps(error, alone=alone):
                    break
        raise failure or _unavailable(ranked)

    def _request(self, image: MissingImage, *, fresh: bool) -> EncodeRequest:
        tag = image.passage.tag
        return EncodeRequest(
            fingerprint=self._fingerprint,
            key=image.key.hex,
            media=image.media,
            processor_kwargs=dict(image.description.processor_kwargs),
            variant=image.description.variant,
            retain=image.retained,
            fresh=fresh,
            salt_tag=None if tag is None else tag.hex(),
        )

    async def _attempt(
        self, instance: int, image: MissingImage, request: EncodeRequest, give_up_at: float, left: int
    ) -> Lease:
        now = asyncio.get_running_loop().time()
        seconds = (give_up_at - now) / left
        try:
            async with asyncio.timeout(seconds):
                with self._metrics.encode_call.time():
                    ready = await self._encoders.encode(instance, request)
                return await self._read_and_commit(image, request, ready)
        except TimeoutError:
            raise EncodeTimeoutError(
                f"an encode worker brought no embedding within {seconds:.3g} seconds; retry later"
            ) from None

    # 6 READ, 7 commit
    async def _read_and_commit(
        self, image: MissingImage, request: EncodeRequest, ready: EncodeReady
    ) -> Lease:
        peer = PeerMetadata.from_wire(ready.peer)
        try:
            ready.check_answers(request)
            dtype = _dtype(ready)
            self._check(image.description, ready.shape, dtype, ready.metadata)
            # In a thread: making room may move other entries, which copies megabytes.
            reserve = partial(self._reserve, image, ready.nbytes)
            with self._metrics.reserve.time():
                reservation = await in_thread(reserve, undo=Reservation.abandon)
        except BaseException:
            self._reader.give_up(peer, ready.token)
            raise
        self._uncached += reservation.owner == _UNCACHED
        export = Export(ready.token, ready.address, ready.nbytes, ready.checksum)
        with self._metrics.transfer.time():
            await self._reader.read_into(
                reservation,
                peer,
                export,
                deadline_s=self._transfer_timeout_s,
                finite_dtype=ready.dtype if self._reject_non_finite else None,
            )
        metadata = {**ready.metadata, ENCODE_SECONDS: ready.encode_seconds}
        try:
            with self._metrics.commit.time():
                lease = reservation.commit(
                    dtype=dtype, shape=ready.shape, metadata=metadata, retain=not image.dropped
                )
        except MmCacheError:
            reservation.abandon()
            raise
        if image.retained and self._what_if is not None:
            self._what_if.loaded(image.key.hex, ready.nbytes)
        return lease

    def _reserve(self, image: MissingImage, nbytes: int) -> Reservation:
        """Reserve room in the cache; where every byte is leased, in the transit arena: served, not cached."""
        try:
            if image.retained:
                return self._cache.reserve(image.key.hex, nbytes, owner="resolver", tag=image.passage.tag)
        except (ArenaFullError, EntryTooLargeError):
            if self._transit is self._cache:
                raise
        return self._transit.reserve(image.key.hex, nbytes, owner=_UNCACHED)


def _was_wrong(failure: MmCacheError | None) -> bool:
    """Whether the embedding itself was wrong, and may lie so in the arena of whoever is asked next."""
    return isinstance(failure, (ChecksumMismatchError, EmbeddingMismatchError))


def _another_attempt_helps(error: MmCacheError, *, alone: bool) -> bool:
    """Whether to ask again: another instance, or where there is `alone` one, that one for other bytes."""
    return isinstance(error, TransferError if alone else (EncodeError, TransferError))


def _unavailable(ranked: list[int]) -> EncodeUnavailableError:
    reason = (
        "every encode worker has failed repeatedly and is being left alone"
        if ranked
        else "no encode worker is alive, so new images cannot be encoded"
    )
    return EncodeUnavailableError(f"{reason}; text and cached images are still served; retry later")


def _dtype(ready: EncodeReady) -> torch.dtype:
    """Return the dtype that is announced, if the size is what it makes of the shape.

    Looked at again at the commit; here, before room is made for what may be a wrong size.
    """
    dtype = getattr(torch, ready.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EmbeddingMismatchError("the encode worker announced an embedding of an unknown dtype")
    rows, width = ready.shape
    if rows * width * dtype.itemsize != ready.nbytes:
        raise EmbeddingMismatchError(
            f"the encode worker announced {ready.nbytes} bytes for {rows} rows of {width} {ready.dtype}"
        )
    return dtype
