"""From an item's bytes to a lease on its embedding in the worker's own arena.

    lookup       in the arena, which is a second level of cache for all PD workers; else one flight per key:
    tiers        a disk or a store that kept it, where there are some; else
    prepare      decode and preprocess, in threads
    encode       a micro-batch through the vision tower
    store        copy into a reserved extent, checksum it, commit

It knows nothing of who asks: `server.py` exports what it makes to PD workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.key import EmbeddingKey, content_digest
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.scope import Dropped, Scope, Selection
from trtllm_mm_cache.encode.batcher import BatchedItem, MicroBatcher
from trtllm_mm_cache.encode.room import PreparedRoom
from trtllm_mm_cache.engines.base import EncodeItem, VisionEncoder
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EncodeFailedError,
    EncodeOverloadedError,
    MmCacheError,
)
from trtllm_mm_cache.media import decode_image, pixels_fingerprint
from trtllm_mm_cache.observability.cache_metrics import CacheCollector, FlightCollector
from trtllm_mm_cache.observability.metrics import STEP_SECONDS, Step, histogram
from trtllm_mm_cache.observability.traces import span
from trtllm_mm_cache.runtime.admission import Admission, Admitted
from trtllm_mm_cache.runtime.drops import Drops, DropWatch
from trtllm_mm_cache.runtime.threads import in_thread
from trtllm_mm_cache.settings import MB, EncodeSettings
from trtllm_mm_cache.tiers.base import TierDropped
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.intake import announced_dtype
from trtllm_mm_cache.tiers.payload import StoredEmbedding
from trtllm_mm_cache.transfer.checksum import checksum
from trtllm_mm_cache.transfer.finite import checksum_and_finite

logger = logging.getLogger(__name__)

_DROP_S = 3600.0  # more than a drop may take; where it fails, until the next one
_FORGET_S = 1.0

Origin = Literal["encoded", "joined", "cached"]
"""Where an embedding came from: the tower, a flight of another call, or where it was kept (arena or tier)."""


@dataclass
class EncodeJob:
    """One item to encode. `fresh`: an embedding that lies in the arena or a tier already will not do.

    `brought` says in the end that it cost no encode: a tier had it.
    """

    key: str
    media: bytes = field(repr=False)
    processor_kwargs: Mapping[str, Any]
    variant: str
    scope: Scope
    fresh: bool = False
    brought: bool = False

    def release_media(self) -> None:
        """Forget the file's bytes: the image is prepared, or a flight that has its own is under way."""
        self.media = b""


@dataclass(frozen=True)
class _Item:
    """A job as the tiers see it (`tiers.stored.Wanted`). Its content is known once it is prepared."""

    job: EncodeJob
    watch: DropWatch
    kind: str = "image"

    @property
    def key(self) -> EmbeddingKey:
        return EmbeddingKey.from_hex(self.job.key)

    @property
    def content(self) -> bytes | None:
        return self.watch.content

    @property
    def scope(self) -> Scope:
        return self.job.scope

    @property
    def retained(self) -> bool:
        return self.job.scope.retain and not self.watch.dropped(self.job.key)


@dataclass(frozen=True)
class _Stored:
    """An embedding that lies in the arena, checked, and is not visible yet."""

    reservation: Reservation
    dtype: torch.dtype
    shape: tuple[int, ...]
    metadata: EmbeddingMetadata

    def commit(self, *, retain: bool) -> Lease:
        try:
            return self.reservation.commit(
                dtype=self.dtype, shape=self.shape, metadata=self.metadata, retain=retain
            )
        except BaseException:
            self.reservation.abandon()
            raise

    def abandon(self) -> None:
        self.reservation.abandon()


class EncodePipeline:
    """Makes embeddings for one encode worker. For use from one event loop; owns neither encoder nor manager.

    Items that wait for the tower are bounded in number and in bytes of their files; beyond it
    `EncodeOverloadedError`. They are decoded and preprocessed when there is room for it.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        manager: MultimodalEmbeddingCacheManager,
        settings: EncodeSettings,
        registry: CollectorRegistry,
        tiers: StoredTiers | None = None,
    ) -> None:
        self._tiers = tiers or StoredTiers()
        self._encoder = encoder
        self._manager = manager
        self._limits = settings.images
        self._fingerprint = pixels_fingerprint(encoder.fingerprint, settings.images)
        self._preparing = Step.new(
            registry, "preprocess", "Decoding and preprocessing one image, the wait for a thread included."
        )
        # No steps: a thread of the pool knows no span that theirs would belong to.
        self._decoding = histogram(
            registry, "decode_seconds", "Of preprocessing, a file to an image.", STEP_SECONDS
        )
        self._processing = histogram(
            registry, "process_seconds", "Of preprocessing, an image to the tower's input.", STEP_SECONDS
        )
        self._storing = Step.new(
            registry, "store", "The tower's output into the arena with its checksum, the wait included."
        )
        self.batcher = MicroBatcher(encoder.encode, max_items=settings.max_batch_images, registry=registry)
        self._threads = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self.flights: SingleFlight[Lease] = SingleFlight(share=Lease.clone, discard=Lease.release)
        self.queue = Admission(
            max_items=settings.max_queued,
            max_bytes=int(settings.max_waiting_image_mb * MB),
            refusal=lambda: EncodeOverloadedError(
                f"{settings.max_queued} images, or images of {settings.max_waiting_image_mb:g} MB, already "
                "wait for the vision tower; retry in a moment"
            ),
        )
        self.room = PreparedRoom(settings.preprocess_threads, int(settings.max_prepared_mb * MB))
        self._drops = Drops()
        flights, cache = FlightCollector(self.flights), CacheCollector({manager.name: manager})
        for part in (cache, flights, self.queue, self.room):
            registry.register(part)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides an embedding's bytes besides the file and the item's kwargs."""
        return self._fingerprint

    async def encode(self, job: EncodeJob) -> tuple[Lease, Origin]:
        """Return a lease on the embedding of `job`, which the caller releases, and where it came from.

        A job that joins a flight is not charged to the queue, and its media are not held while it waits.
        Raises `RequestError` for what is wrong with the item, `EncodeError` for what is wrong here.
        """
        watch = self._drops.watch(job.scope.tag)
        item = _Item(job, watch)
        if job.fresh:
            await self._forget(job.key)
        origin: Origin = "cached"
        lease = self._manager.lease(job.key)
        if lease is None:
            if job.key in self.flights:
                job.release_media()
            lease, joined = await self.flights.run(job.key, partial(self._load, item))
            origin = "joined" if joined else "cached" if job.brought else "encoded"
        else:
            self._tiers.offer(item, lease)
        if not job.scope.retain:
            self._manager.drop(job.key)  # the lease keeps it until its last reader is done
        return lease, origin

    async def drop(
        self, selection: Selection, *, deadline_s: float, bar_s: float
    ) -> tuple[Dropped, TierDropped]:
        """Drop what is stored, here and in the tiers, and retain nothing of it that is being encoded now.

        `bar_s` as in `DropRequest`. Raises `MmCacheError` where a tier could not; the arena has dropped then.
        """
        self._drops.bar(selection, seconds=bar_s or _DROP_S)
        self._drops.drop(selection)
        dropped = self._manager.drop_selected(selection)
        stored = await self._tiers.drop(selection, deadline_s=deadline_s)
        if not bar_s:
            self._drops.unbar(selection)
        return dropped, stored

    async def close(self) -> None:
        """Stop flights and batches."""
        await self.flights.close()
        await self.batcher.close()
        await self._tiers.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _forget(self, key: str) -> None:
        """Drop what was found wrong; a tier that fails now has its own checks when it is asked again."""
        self._manager.drop(key)
        with suppress(MmCacheError):
            await self._tiers.drop(Selection(key=key), deadline_s=_FORGET_S)

    async def _load(self, item: _Item) -> Lease:
        """One flight: from a tier, or made."""
        with self.queue.admitted(len(item.job.media)) as admitted:
            lease = await self._tiers.load(item, self._receive)
            if lease is not None:
                item.job.brought = True
                item.job.release_media()
                return lease
            lease = await self._make(item.job, item.watch, admitted)
        self._tiers.offer(item, lease)
        return lease

    async def _receive(self, item: _Item, found: StoredEmbedding) -> Lease:
        """Take what a tier has found into the arena."""
        reserve = partial(
            self._manager.reserve,
            item.job.key,
            found.nbytes,
            owner="encode worker",
            tag=item.scope.tag,
            content=found.content,
        )
        try:
            dtype = announced_dtype(found)
            reservation = await in_thread(reserve, undo=Reservation.abandon, executor=self._threads)
        except BaseException:
            found.release()
            raise
        await found.read_into(reservation, finite=True)
        return _Stored(reservation, dtype, found.shape, found.metadata).commit(retain=item.retained)

    async def _make(self, job: EncodeJob, watch: DropWatch, admitted: Admitted) -> Lease:
        """Bytes to image to preprocessed input to embedding to arena."""
        loop = asyncio.get_running_loop()
        with self._preparing.time():
            async with self.room.turn():
                prepared, watch.content = await loop.run_in_executor(self._threads, self._prepare, job)
        job.release_media()
        admitted.shrink(admitted.nbytes)
        with self.room.held(self._encoder.prepared_bytes(prepared)), span("encode") as current:
            submitted = self.batcher.submit(prepared)
            del prepared
            result = await submitted
            current.set_attribute("encode_seconds", result.encode_seconds)
        logger.debug("encoded %s… in %.3f s", job.key[:12], result.encode_seconds)
        with self._storing.time():
            store = partial(self._store, job, watch.content, result)
            stored = await in_thread(store, undo=_Stored.abandon, executor=self._threads)
        # On the event loop, so that no drop comes between this look at the watch and the commit.
        return stored.commit(retain=job.scope.retain and not watch.dropped(job.key))

    def _prepare(self, job: EncodeJob) -> tuple[Any, bytes]:
        """Return the encoder's input and the digest of the media."""
        try:
            with self._decoding.time():
                image = decode_image(job.media, self._limits)
            with self._processing.time():
                prepared = self._encoder.preprocess(EncodeItem(image, job.processor_kwargs, job.variant))
            return prepared, content_digest(job.media)
        except MmCacheError:
            raise
        except Exception as error:
            # Anything else would look to the PD worker as if this worker were broken, and one client's
            # image could then open its breaker for all.
            raise EncodeFailedError(
                "this image could not be prepared for the vision tower; see the encode worker's log"
            ) from error

    def _store(self, job: EncodeJob, content: bytes | None, result: BatchedItem) -> _Stored:
        """Copy the tower's output into the arena. Runs in a thread: a copy of megabytes.

        What the encode cost is kept with the entry, so that a later hit knows what it saved, and so is
        the checksum: taken here, while the bytes are in the processor's cache, it serves every export.
        """
        tensor = result.item.tensor.detach().contiguous()  # which it is: no copy
        if tensor.dim() != 2:
            raise EncodeFailedError(f"the engine made an embedding of {tensor.dim()} dimensions instead of 2")
        nbytes = tensor.numel() * tensor.element_size()
        try:
            reservation = self._manager.reserve(
                job.key, nbytes, owner="encode worker", tag=job.scope.tag, content=content
            )
        except ArenaFullError as error:
            raise EncodeOverloadedError(
                "every byte of the encode worker's arena is leased until a PD worker's READ; retry in a "
                "moment, or give the encode worker a larger arena"
            ) from error
        try:
            metadata = replace(
                result.item.metadata,
                encode_seconds=result.encode_seconds,
                checksum=_written(reservation, tensor),
            )
        except BaseException:
            reservation.abandon()
            raise
        return _Stored(reservation, tensor.dtype, tuple(tensor.shape), metadata)


def _written(reservation: Reservation, tensor: torch.Tensor) -> int:
    """Write a contiguous tensor into its extent and return the checksum; one pass over host memory."""
    if tensor.device.type == "cpu":
        found, _ = checksum_and_finite(
            reservation.address, reservation.nbytes, None, source=tensor.data_ptr()
        )
        return found
    reservation.write(tensor, computed=True)
    return checksum(reservation.address, reservation.nbytes)
