"""The prefill+decode worker: resolves a request's images, then streams the model's tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import Context, DistributedRuntime

from trtllm_mm_cache.config import MB, PdSettings
from trtllm_mm_cache.engines.base import Generator, TokenDelta
from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import MediaSettings, MediaSource
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.metrics import Exposition, Reading, cache_readings
from trtllm_mm_cache.workers.detached import detached
from trtllm_mm_cache.workers.encode_client import EncodeClient
from trtllm_mm_cache.workers.faults import as_dynamo_error
from trtllm_mm_cache.workers.memory import PdMemory
from trtllm_mm_cache.workers.model_files import local_model_path
from trtllm_mm_cache.workers.request import PdRequest, parse_request
from trtllm_mm_cache.workers.resolver import ImageResolver, ResolvedImages
from trtllm_mm_cache.workers.runtime import (
    RequestStoppedError,
    connect,
    drain_on_signals,
    endpoint_path,
    stream_until_stopped,
    until_stopped,
)

logger = logging.getLogger(__name__)


def run_pd_worker(settings: PdSettings) -> None:
    """Load the model, serve until SIGTERM or SIGINT, drain, return. Raises `ConfigurationError` at start.

    Under mpirun this is rank 0; every other rank only computes with it, and returns when it has ended.
    """
    configure_logging(settings.log_level)
    if place_in_job().rank > 0:
        load_engine(settings.engine).follow(settings.extra_engine_args)
        return
    asyncio.run(_serve(settings))


async def _serve(settings: PdSettings) -> None:
    runtime = connect(settings)
    drain_on_signals(runtime)
    model_path = await local_model_path(settings.model_path)
    # Memory first: a host that cannot hold it says so before minutes of model loading.
    memory = await PdMemory.create(settings)
    try:
        await _serve_model(runtime, memory, model_path, settings)
    finally:
        await memory.close()
        logger.info("PD worker ended")


async def _serve_model(
    runtime: DistributedRuntime, memory: PdMemory, model_path: str, settings: PdSettings
) -> None:
    engine = await asyncio.to_thread(load_engine, settings.engine)
    generator = await asyncio.to_thread(engine.load_generator, Path(model_path), settings.extra_engine_args)
    client = await runtime.endpoint(endpoint_path(settings.encode_endpoint)).client()
    media_settings = _media_settings(settings)
    resolver = ImageResolver(
        source=MediaSource(media_settings),
        media_settings=media_settings,
        cache=memory.cache,
        transit=memory.transit,
        client=EncodeClient(client),
        reader=memory.reader,
        fingerprint=generator.fingerprint,
        encode_timeout_s=settings.encode_timeout_s,
        transfer_timeout_s=settings.transfer_timeout_s,
        require_salt=settings.multimodal_embedding_cache_require_salt,
    )
    worker = PdWorker(generator, resolver, memory, settings)
    try:
        await _serve_endpoint(runtime, worker, model_path, settings)
    finally:
        await worker.close()


async def _serve_endpoint(
    runtime: DistributedRuntime, worker: PdWorker, model_path: str, settings: PdSettings
) -> None:
    endpoint = runtime.endpoint(endpoint_path(settings.endpoint))
    labels = {"dynamo_component": "pd", "model": settings.model_name}
    endpoint.metrics.register_prometheus_expfmt_callback(Exposition(worker.readings, labels).render)
    # The encode worker is never among the model's `needs`: without it text and cached images go on.
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        model_path,
        settings.model_name,
        worker_type=WorkerType.Aggregated,
    )
    logger.info(
        "PD worker ready: model %s, cache %.2f GB",
        settings.model_name,
        settings.multimodal_embedding_cache_capacity_gb,
    )
    await endpoint.serve_endpoint(worker.handle, metrics_labels=[("model", settings.model_name)])


def _media_settings(settings: PdSettings) -> MediaSettings:
    return MediaSettings(
        allowed_local_media_path=settings.allowed_local_media_path,
        max_file_size_bytes=int(settings.max_file_size_mb * MB),
        allow_private_addresses=settings.allow_private_addresses,
        http_total_timeout=settings.media_timeout_s,
        http_cache_bytes=int(settings.http_cache_mb * MB),
        max_image_pixels=int(settings.max_image_megapixels * 1e6),
    )


class PdWorker:
    """Answers generation requests of Dynamo's frontend. For use from one event loop."""

    def __init__(
        self, generator: Generator, resolver: ImageResolver, memory: PdMemory, settings: PdSettings
    ) -> None:
        self._generator = generator
        self._resolver = resolver
        self._memory = memory
        self._max_images = settings.max_images_per_request
        self._requests = 0
        self._errors: Counter[str] = Counter()

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        """Stream the answer to one request, in the form Dynamo's frontend expects of a worker."""
        async for output in detached(self._answer(payload, context)):
            yield output

    async def _answer(self, payload: Any, context: Context) -> AsyncGenerator[dict[str, Any]]:
        self._requests += 1
        try:
            request = parse_request(payload, context.id(), max_images=self._max_images)
            images: ResolvedImages = await until_stopped(context, self._resolve(request))
            try:
                async with aclosing(self._generate(request, images, context)) as outputs:
                    async for output in outputs:
                        yield output
            finally:
                images.release()
        except RequestStoppedError:
            logger.info("request %s: stopped by the client while its images were resolved", context.id())
        except MmCacheError as error:
            self._errors[error.code] += 1
            logger.warning("request %s: %s: %s", context.id(), error.code, error, exc_info=error.__cause__)
            raise as_dynamo_error(error) from error
        except Exception as error:
            # An engine may raise anything; its text may hold paths and addresses, so the log alone gets it.
            self._errors[MmCacheError.code] += 1
            logger.exception("request %s: the engine failed", context.id())
            raise as_dynamo_error(MmCacheError("the engine failed on this request")) from error

    def readings(self) -> Iterable[Reading]:
        """Yield the metrics of this moment."""
        yield from cache_readings(self._memory.cache.stats)
        prefix = "trtllm_mm_cache"
        yield Reading(f"{prefix}_requests", "Requests taken.", "counter", self._requests)
        flights = self._resolver.flights.statistics()
        yield Reading(f"{prefix}_flights", "Flights to an encode worker started.", "counter", flights.started)
        yield Reading(f"{prefix}_flights_joined", "Lookups that joined a flight.", "counter", flights.joined)
        resolver = self._resolver.statistics()
        yield Reading(f"{prefix}_encode_retries", "Second attempts.", "counter", resolver.retries)
        yield Reading(f"{prefix}_uncached", "Embeddings served uncached.", "counter", resolver.uncached)
        yield Reading(f"{prefix}_read_bytes", "Bytes READ by NIXL.", "counter", resolver.bytes_read)
        for name, manager in (("cache", self._memory.cache), ("transit", self._memory.transit)):
            held, labels = manager.statistics(), (("arena", name),)
            yield Reading(f"{prefix}_leased_bytes", "Bytes held.", "gauge", held.leased_bytes, labels)
            yield Reading(
                f"{prefix}_quarantined_bytes",
                "Bytes a READ may still write to.",
                "gauge",
                held.quarantined_bytes,
                labels,
            )
        for code, count in self._errors.items():
            yield Reading(f"{prefix}_errors", "Requests not served.", "counter", count, (("code", code),))

    async def close(self) -> None:
        """Stop flights and generation, free the model."""
        await self._resolver.close()
        await self._generator.close()

    async def _resolve(self, request: PdRequest) -> ResolvedImages:
        return await self._resolver.resolve(
            request.image_references,
            processor_kwargs=request.processor_kwargs,
            salt=request.generation.cache_salt,
            variant=self._generator.variant(len(request.image_references)),
        )

    async def _generate(
        self, request: PdRequest, images: ResolvedImages, context: Context
    ) -> AsyncGenerator[dict[str, Any]]:
        """Step 8: generate; the leases are held until the engine is done with them."""
        started = time.perf_counter()
        first_after: float | None = None
        count = 0
        stopped = False
        tokens = self._generator.generate(request.generation, images.leases)
        deltas = stream_until_stopped(context, tokens)
        try:
            async for delta in deltas:
                first_after = first_after or time.perf_counter() - started
                count += len(delta.token_ids)
                yield _output(delta, count)
        except RequestStoppedError:
            stopped = True
        except (GeneratorExit, asyncio.CancelledError):
            stopped = True
            raise
        finally:
            await deltas.aclose()
            if stopped:
                _log_answer(request, images, first_after, count, stopped=True)
        if not stopped:
            _log_answer(request, images, first_after, count, stopped=False)


def _log_answer(
    request: PdRequest, images: ResolvedImages, first_after: float | None, tokens: int, *, stopped: bool
) -> None:
    logger.info(
        "request %s: images %d (hits %d, misses %d, %d bytes, %.3f s), first token %.3f s, tokens %d%s",
        request.generation.request_id,
        len(images.leases),
        images.hits,
        images.misses,
        images.nbytes,
        images.seconds,
        first_after or 0.0,
        tokens,
        ", stopped by the client" if stopped else "",
    )


def _output(delta: TokenDelta, completion_tokens: int) -> dict[str, Any]:
    output: dict[str, Any] = {"token_ids": list(delta.token_ids)}
    if delta.finish_reason is not None:
        output["finish_reason"] = delta.finish_reason
        output["completion_usage"] = {
            "prompt_tokens": delta.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": delta.prompt_tokens + completion_tokens,
        }
    return output
