"""One call at the encode worker: image bytes in, an exported embedding out.

One call is one image. Its way: second-level lookup in the worker's own arena; else one flight per
key: decode and preprocess in threads, a micro-batch through the vision tower, a copy into the
arena; then the export, which pins the entry until the PD worker has READ it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dynamo.runtime import Context
from opentelemetry.trace import SpanKind
from prometheus_client.core import Metric

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.encode.batcher import BatchedItem, MicroBatcher
from trtllm_mm_cache.encode.encode_readings import encode_readings
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.engines.base import EncodeItem, VisionEncoder
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EncodeFailedError,
    EncodeOverloadedError,
    MmCacheError,
    ProtocolMismatchError,
)
from trtllm_mm_cache.media import MediaSettings, decode_image
from trtllm_mm_cache.observability.exposition import Reading
from trtllm_mm_cache.observability.logs import loggable_cause
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.runtime.admission import Admission
from trtllm_mm_cache.runtime.connect import RequestStoppedError, until_stopped
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.media_limits import image_limits
from trtllm_mm_cache.runtime.messages import ENCODE_SECONDS, EncodeFault, EncodeReady, EncodeRequest, parse
from trtllm_mm_cache.runtime.passages import Passage, Passages
from trtllm_mm_cache.runtime.threads import in_thread
from trtllm_mm_cache.settings import MB, EncodeSettings
from trtllm_mm_cache.transfer import Exporter, PeerMetadata
from trtllm_mm_cache.transfer.checksum import checksum

logger = logging.getLogger(__name__)

_CHECKSUM = "xxh3_64"


@dataclass(frozen=True)
class _Stored:
    """An embedding that lies in the arena, checksummed, and is not visible yet."""

    reservation: Reservation
    dtype: torch.dtype
    shape: tuple[int, ...]
    metadata: dict[str, Any]

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


class EncodeWorker:
    """Answers `EncodeRequest`s. For use from one event loop; owns the batcher, not the other parts."""

    def __init__(
        self,
        encoder: VisionEncoder,
        manager: MultimodalEmbeddingCacheManager,
        exporter: Exporter,
        peer: PeerMetadata,
        settings: EncodeSettings,
        metrics: EncodeMetrics | None = None,
    ) -> None:
        self._metrics = metrics or EncodeMetrics()
        self._encoder = encoder
        self._manager = manager
        self._exporter = exporter
        self._peer = peer.to_wire()
        self._media_settings = MediaSettings(**image_limits(settings))
        self._batcher = MicroBatcher(
            encoder.encode,
            max_images=settings.max_batch_images,
            max_wait_s=settings.max_batch_wait_ms / 1000,
            max_queued=settings.max_queued_images,
            metrics=self._metrics,
        )
        self._threads = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self._flights: SingleFlight[Lease] = SingleFlight()
        self._queue = Admission(
            max_items=settings.max_queued_images,
            max_bytes=int(settings.max_queued_mb * MB),
            refusal=lambda: EncodeOverloadedError(
                f"{settings.max_queued_images} images, or images of {settings.max_queued_mb:g} MB, already "
                "wait for the vision tower; retry in a moment"
            ),
        )
        self._passages = Passages()

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        """Answer one call of a PD worker with one message: `EncodeReady` or `EncodeFault`."""
        try:
            request = parse(EncodeRequest, payload)
            self._check_fingerprint(request)
            parent = remote_parent(request.trace_headers)
            with span("encode_request", parent=parent, kind=SpanKind.SERVER) as current:
                ready: EncodeReady = await until_stopped(context, self._answer(request))
                current.set_attributes({"origin": ready.origin, "bytes": ready.nbytes})
        except RequestStoppedError:
            return
        except MmCacheError as error:
            self._metrics.errors.labels(error.code).inc()
            logger.warning(
                "call %s: embedding not delivered: %s: %s",
                context.id(),
                error.code,
                error.message,
                extra={"call_id": context.id(), "code": error.code},
                exc_info=loggable_cause(error),
            )
            yield EncodeFault.of(error).model_dump()
        else:
            if context.is_stopped():  # what is sent now is dropped on the way, and nobody would READ it
                self._exporter.release(ready.token)
                return
            self._metrics.delivered(ready.origin, encode_seconds=ready.encode_seconds)
            yield ready.model_dump()

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop what is stored, and retain nothing of it that is being encoded now."""
        self._passages.drop(request.selection)
        dropped = self._manager.drop_selected(request.selection)
        return DropReport(entries=dropped.entries, nbytes=dropped.nbytes)

    def readings(self) -> Iterable[Reading | Metric]:
        """Yield the snapshots of this moment. Any thread."""
        return encode_readings(
            self._manager,
            self._flights.statistics(),
            self._batcher.statistics(),
            self._queue.statistics(),
            self._exporter,
        )

    async def close(self) -> None:
        """Stop flights and batches, free the model."""
        await self._flights.close()
        await self._batcher.close()
        await asyncio.to_thread(self._threads.shutdown)
        self._encoder.close()

    def _check_fingerprint(self, request: EncodeRequest) -> None:
        if request.fingerprint != self._encoder.fingerprint:
            raise ProtocolMismatchError(
                "the PD worker and the encode worker run different models, engines or stored dtypes; "
                "start both with the same --model-path, --engine and embedding dtype"
            )

    async def _answer(self, request: EncodeRequest) -> EncodeReady:
        passage = self._passages.begin(request.tag)
        if request.fresh:
            self._manager.drop(request.key)
        lease = self._manager.lease(request.key)
        if lease is not None:
            origin = "cached"
        else:
            with self._queue.admitted(len(request.media)):
                lease, joined = await self._flights.run(
                    request.key,
                    lambda: self._encode(request, passage),
                    share=Lease.clone,
                    discard=Lease.release,
                )
            origin = "joined" if joined else "encoded"
        if not request.retain:
            self._manager.drop(request.key)  # the lease keeps it until the READ is over
        return await self._export(lease, origin)

    async def _encode(self, request: EncodeRequest, passage: Passage) -> Lease:
        """One flight: bytes to image to preprocessed input to embedding to arena."""
        loop = asyncio.get_running_loop()
        with self._metrics.preprocess.time():
            prepared = await loop.run_in_executor(self._threads, self._prepare, request)
        with span("encode") as current:
            result = await self._batcher.submit(prepared)
            current.set_attribute("encode_seconds", result.encode_seconds)
        logger.debug("encoded %s… in %.3f s", request.key[:12], result.encode_seconds)
        with span("store"):
            stored = await in_thread(
                partial(self._store, request, result), undo=_Stored.abandon, executor=self._threads
            )
        # On the event loop, so that no drop comes between this look at the passage and the commit.
        return stored.commit(retain=request.retain and not passage.dropped(request.key))

    def _prepare(self, request: EncodeRequest) -> Any:
        try:
            image = decode_image(request.media, self._media_settings)
            return self._encoder.preprocess(EncodeItem(image, request.processor_kwargs, request.variant))
        except MmCacheError:
            raise
        except Exception as error:
            # Anything else would look to the PD worker as if this worker were broken, and one client's
            # image could then open its breaker for all.
            raise EncodeFailedError(
                "this image could not be prepared for the vision tower; see the encode worker's log"
            ) from error

    def _store(self, request: EncodeRequest, result: BatchedItem) -> _Stored:
        """Copy the tower's output into the arena. Runs in a thread: a copy of megabytes.

        What the encode cost is kept with the entry, so that a later hit knows what it saved, and so is
        the checksum: taken here, while the bytes are in the processor's cache, it serves every export.
        """
        tensor = result.image.tensor.detach().contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        try:
            reservation = self._manager.reserve(request.key, nbytes, owner="encode worker", tag=request.tag)
        except ArenaFullError as error:
            raise EncodeOverloadedError(
                "every byte of the encode worker's arena is waiting for a PD worker's READ; retry in a "
                "moment, or give the encode worker a larger arena"
            ) from error
        try:
            reservation.write(tensor)
            metadata = {
                **result.image.metadata,
                ENCODE_SECONDS: result.encode_seconds,
                _CHECKSUM: checksum(reservation.address, nbytes),
            }
        except BaseException:
            reservation.abandon()
            raise
        return _Stored(reservation, tensor.dtype, tuple(tensor.shape), metadata)

    async def _export(self, lease: Lease, origin: Any) -> EncodeReady:
        embedding = lease.embedding
        dtype, shape = str(embedding.tensor.dtype).removeprefix("torch."), tuple(embedding.tensor.shape)
        if len(shape) != 2:
            lease.release()
            raise EncodeFailedError(f"the engine made an embedding of {len(shape)} dimensions instead of 2")
        metadata = dict(embedding.metadata or {})
        encode_seconds = metadata.pop(ENCODE_SECONDS)
        export = await self._exporter.export(lease, checksum=metadata.pop(_CHECKSUM))
        return EncodeReady(
            fingerprint=self._encoder.fingerprint,
            key=lease.key,
            peer=self._peer,
            token=export.token,
            address=export.address,
            nbytes=export.nbytes,
            checksum=export.checksum,
            dtype=dtype,
            shape=(shape[0], shape[1]),
            metadata=metadata,
            encode_seconds=encode_seconds,
            origin=origin,
        )
