"""One embedding by the vision tower, from a file's bytes into the worker's arena.

prepare      decode and preprocess, in threads
encode       a micro-batch through the tower
store        copy into a reserved extent, checksum it
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import content_digest
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.batcher import BatchedItem, MicroBatcher
from trtllm_mm_cache.encode.room import PreparedRoom
from trtllm_mm_cache.engines.base import EncodeItem, VisionEncoder
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EncodeFailedError,
    EncodeOverloadedError,
    MmCacheError,
)
from trtllm_mm_cache.media import decode_image
from trtllm_mm_cache.observability.metrics import STEP_SECONDS, Step, histogram
from trtllm_mm_cache.observability.traces import span
from trtllm_mm_cache.runtime.admission import Admitted
from trtllm_mm_cache.runtime.drops import DropWatch
from trtllm_mm_cache.settings import MB, EncodeSettings
from trtllm_mm_cache.threads import in_thread
from trtllm_mm_cache.transfer.checksum import checksum
from trtllm_mm_cache.transfer.finite import checksum_and_finite

logger = logging.getLogger(__name__)


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
class Stored:
    """An embedding that lies in the arena, checked, and is not visible yet."""

    reservation: Reservation
    dtype: torch.dtype
    shape: tuple[int, ...]
    metadata: EmbeddingMetadata

    def commit(self, *, retain: bool) -> Lease:
        """Make it visible, or with `retain` False pass it on; return a lease on it."""
        try:
            return self.reservation.commit(
                dtype=self.dtype, shape=self.shape, metadata=self.metadata, retain=retain
            )
        except BaseException:
            self.reservation.abandon()
            raise

    def abandon(self) -> None:
        """Free its room."""
        self.reservation.abandon()


class Maker:
    """Makes what the arena and the tiers lack. For use from one event loop; owns neither encoder nor manager.

    Files are decoded and preprocessed by `threads` when there is room for it (`PreparedRoom`).
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        manager: MultimodalEmbeddingCacheManager,
        settings: EncodeSettings,
        registry: CollectorRegistry,
    ) -> None:
        self._encoder = encoder
        self._manager = manager
        self._limits = settings.images
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
        self.threads = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self.room = PreparedRoom(settings.preprocess_threads, int(settings.max_prepared_mb * MB))
        registry.register(self.room)

    async def close(self) -> None:
        """Stop the batches, let the threads end."""
        await self.batcher.close()
        await asyncio.to_thread(self.threads.shutdown)

    async def make(self, job: EncodeJob, watch: DropWatch, admitted: Admitted) -> Stored:
        """Bytes to image to preprocessed input to embedding to arena; the caller commits it or abandons it.

        The digest of the media goes into `watch`; `admitted` is given back when the media are.
        Raises `RequestError` for what is wrong with the image, `EncodeError` for what is wrong here.
        """
        loop = asyncio.get_running_loop()
        with self._preparing.time():
            async with self.room.turn():
                prepared, watch.content = await loop.run_in_executor(self.threads, self._prepare, job)
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
            return await in_thread(store, undo=Stored.abandon, executor=self.threads)

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

    def _store(self, job: EncodeJob, content: bytes | None, result: BatchedItem) -> Stored:
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
        return Stored(reservation, tensor.dtype, tuple(tensor.shape), metadata)


def _written(reservation: Reservation, tensor: torch.Tensor) -> int:
    """Write a contiguous tensor into its extent and return the checksum; one pass over host memory."""
    if tensor.device.type == "cpu":
        found, _ = checksum_and_finite(
            reservation.address, reservation.nbytes, None, source=tensor.data_ptr()
        )
        return found
    reservation.write(tensor, computed=True)
    return checksum(reservation.address, reservation.nbytes)
