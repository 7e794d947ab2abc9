"""The encode worker: image bytes in, an exported embedding out.

One call is one image. Its way: second-level lookup in the worker's own arena; else one flight per
key: decode and preprocess in threads, a micro-batch through the vision tower, a copy into the
arena; then the export, which pins the entry until the PD worker has READ it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dynamo.runtime import Context

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.policy import make_policy
from trtllm_mm_cache.config import GB, MB, EncodeSettings
from trtllm_mm_cache.engines.base import EncodeItem, VisionEncoder
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EncodeFailedError,
    EncodeOverloadedError,
    MmCacheError,
    ProtocolMismatchError,
)
from trtllm_mm_cache.media import MediaSettings, decode_image
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.metrics import Exposition, Reading, cache_readings
from trtllm_mm_cache.transfer import Exporter, PeerMetadata, TransferAgent
from trtllm_mm_cache.transfer.checksum import checksum
from trtllm_mm_cache.workers.batcher import BatchedImage, MicroBatcher
from trtllm_mm_cache.workers.model_files import local_model_path
from trtllm_mm_cache.workers.protocol import EncodeFault, EncodeReady, EncodeRequest, parse
from trtllm_mm_cache.workers.runtime import (
    RequestStoppedError,
    connect,
    drain_on_signals,
    endpoint_path,
    until_stopped,
)
from trtllm_mm_cache.workers.threads import in_thread

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 5.0
_CHECKSUM = "xxh3_64"


def run_encode_worker(settings: EncodeSettings) -> None:
    """Load the model, serve until SIGTERM or SIGINT, drain, return. Raises `ConfigurationError` at start."""
    configure_logging(settings.log_level)
    asyncio.run(_serve(settings))


async def _serve(settings: EncodeSettings) -> None:
    runtime = connect(settings)
    drain_on_signals(runtime)
    model_path = await local_model_path(settings.model_path)
    engine = await asyncio.to_thread(load_engine, settings.engine)
    encoder = await asyncio.to_thread(
        engine.load_vision_encoder, Path(model_path), settings.extra_engine_args
    )
    capacity = int(settings.multimodal_embedding_cache_capacity_gb * GB)
    policy = make_policy(settings.multimodal_embedding_cache_policy, capacity)
    manager = await asyncio.to_thread(MultimodalEmbeddingCacheManager, capacity, policy=policy)
    agent = await TransferAgent.start()
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    exporter = Exporter(agent, lease_timeout_s=settings.lease_timeout_s)
    worker = EncodeWorker(encoder, manager, exporter, agent.metadata, settings)
    endpoint = runtime.endpoint(endpoint_path(settings.endpoint))
    exposition = Exposition(worker.readings, {"dynamo_component": "encode", "model": Path(model_path).name})
    endpoint.metrics.register_prometheus_expfmt_callback(exposition.render)
    logger.info(
        "encode worker ready: arena %.2f GB, fingerprint %s…", capacity / GB, encoder.fingerprint[:12]
    )
    try:
        await endpoint.serve_endpoint(worker.handle)
    finally:
        await worker.close()
        await agent.close(deadline_s=_CLOSE_DEADLINE_S)
        manager.close()
        logger.info("encode worker ended")


class EncodeWorker:
    """Answers `EncodeRequest`s. For use from one event loop; owns the batcher, not the other parts."""

    def __init__(
        self,
        encoder: VisionEncoder,
        manager: MultimodalEmbeddingCacheManager,
        exporter: Exporter,
        peer: PeerMetadata,
        settings: EncodeSettings,
    ) -> None:
        self._encoder = encoder
        self._manager = manager
        self._exporter = exporter
        self._peer = peer.to_wire()
        self._media_settings = MediaSettings(
            max_file_size_bytes=int(settings.max_file_size_mb * MB),
            max_image_pixels=int(settings.max_image_megapixels * 1e6),
        )
        self._batcher = MicroBatcher(
            encoder.encode,
            max_images=settings.max_batch_images,
            max_wait_s=settings.max_batch_wait_ms / 1000,
            max_queued=settings.max_queued_images,
        )
        self._threads = ThreadPoolExecutor(settings.preprocess_threads, thread_name_prefix="preprocess")
        self._flights: SingleFlight[Lease] = SingleFlight()
        self._origins: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        """Answer one call of a PD worker with one message: `EncodeReady` or `EncodeFault`."""
        try:
            request = parse(EncodeRequest, payload)
            self._check_fingerprint(request)
            ready: EncodeReady = await until_stopped(context, self._answer(request))
        except RequestStoppedError:
            return
        except MmCacheError as error:
            self._errors[error.code] += 1
            logger.warning(
                "embedding not delivered: %s: %s", error.code, error.message, exc_info=error.__cause__
            )
            yield EncodeFault.of(error).model_dump()
        else:
            self._origins[ready.origin] += 1
            yield ready.model_dump()

    def readings(self) -> Iterable[Reading]:
        """Yield the metrics of this moment."""
        yield from cache_readings(self._manager.stats)
        batches = self._batcher.statistics()
        prefix = "trtllm_mm_cache"
        yield Reading(f"{prefix}_encodes", "Images through the vision tower.", "counter", batches.images)
        yield Reading(f"{prefix}_encode_batches", "Runs of the vision tower.", "counter", batches.batches)
        yield Reading(f"{prefix}_encode_queue", "Images waiting for the tower.", "gauge", batches.queued)
        for origin in ("encoded", "joined", "cached"):
            labels = (("origin", origin),)
            yield Reading(
                f"{prefix}_embeddings", "Embeddings delivered.", "counter", self._origins[origin], labels
            )
        for code, count in self._errors.items():
            yield Reading(f"{prefix}_errors", "Calls not served.", "counter", count, (("code", code),))
        exports = self._exporter.statistics()
        yield Reading(f"{prefix}_exports_held", "Exports not yet READ.", "gauge", exports.held)
        yield Reading(f"{prefix}_exports_timed_out", "Exports never READ.", "counter", exports.timed_out)

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
        lease = self._manager.lease(request.key)
        if lease is not None:
            origin = "cached"
        else:
            lease, joined = await self._flights.run(
                request.key, lambda: self._encode(request), share=Lease.clone, discard=Lease.release
            )
            origin = "joined" if joined else "encoded"
        if not request.retain:
            self._manager.drop(request.key)  # the lease keeps it until the READ is over
        return await self._export(lease, origin)

    async def _encode(self, request: EncodeRequest) -> Lease:
        """One flight: bytes to image to preprocessed input to embedding to arena."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, self._prepare, request)
        result = await self._batcher.submit(prepared)
        logger.debug("encoded %s… in %.3f s", request.key[:12], result.encode_seconds)
        return await in_thread(
            partial(self._store, request.key, result), undo=Lease.release, executor=self._threads
        )

    def _prepare(self, request: EncodeRequest) -> Any:
        image = decode_image(request.media, self._media_settings)
        return self._encoder.preprocess(EncodeItem(image, request.processor_kwargs, request.variant))

    def _store(self, key: str, result: BatchedImage) -> Lease:
        """Copy the tower's output into the arena. Runs in a thread: a copy of megabytes.

        What the encode cost is kept with the entry, so that a later hit knows what it saved, and so is
        the checksum: taken here, while the bytes are in the processor's cache, it serves every export.
        """
        tensor = result.image.tensor.detach().contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        try:
            reservation = self._manager.reserve(key, nbytes, owner="encode worker")
        except ArenaFullError as error:
            raise EncodeOverloadedError(
                "every byte of the encode worker's arena is waiting for a PD worker's READ; retry in a "
                "moment, or give the encode worker a larger arena"
            ) from error
        try:
            reservation.write(tensor)
            metadata = {
                **result.image.metadata,
                "encode_seconds": result.encode_seconds,
                _CHECKSUM: checksum(reservation.address, nbytes),
            }
            return reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape), metadata=metadata)
        except BaseException:
            reservation.abandon()
            raise

    async def _export(self, lease: Lease, origin: Any) -> EncodeReady:
        embedding = lease.embedding
        dtype, shape = str(embedding.tensor.dtype).removeprefix("torch."), tuple(embedding.tensor.shape)
        if len(shape) != 2:
            lease.release()
            raise EncodeFailedError(f"the engine made an embedding of {len(shape)} dimensions instead of 2")
        metadata = dict(embedding.metadata or {})
        export = await self._exporter.export(lease, checksum=metadata.pop(_CHECKSUM))
        return EncodeReady(
            peer=self._peer,
            token=export.token,
            address=export.address,
            nbytes=export.nbytes,
            checksum=export.checksum,
            dtype=dtype,
            shape=(shape[0], shape[1]),
            metadata=metadata,
            origin=origin,
        )
