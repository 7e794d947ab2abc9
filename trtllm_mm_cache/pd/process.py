"""The process of a prefill+decode worker: memory, model, resolver, endpoint."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from trtllm_mm_cache.engines.base import Generator
from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.observability.cache_metrics import CacheCollector, WhatIfCollector
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.observability.traces import configure_tracing
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.pd.memory import PdMemory
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.connect import DistributedRuntime, connect, drain_on_signals, endpoint_path
from trtllm_mm_cache.runtime.control import Control, control_path
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.runtime.model import local_model_path, offer_model
from trtllm_mm_cache.runtime.presence import serve_present
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.encode_remote import EncodeTier, EncodeWorkers
from trtllm_mm_cache.tiers.receive import Receiver

logger = logging.getLogger(__name__)


def run_pd_worker(settings: PdSettings) -> None:
    """Load the model, serve until SIGTERM or SIGINT, drain, return. Raises `ConfigurationError` at start.

    Under mpirun this is rank 0; every other rank only computes with it, and returns when it has ended.
    """
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing("pd")
    if place_in_job().rank > 0:
        load_engine(settings.engine).follow(settings.extra_engine_args)
        return
    asyncio.run(_serve(settings))


async def _serve(settings: PdSettings) -> None:
    runtime = connect(settings)
    draining = drain_on_signals(runtime)
    model_path = await local_model_path(settings.model_path)
    # Memory first: a host that cannot hold it says so before minutes of model loading.
    memory = await PdMemory.create(settings)
    try:
        await _serve_model(runtime, draining, memory, model_path, settings)
    finally:
        await memory.close()
        logger.info("PD worker ended")


async def _serve_model(
    runtime: DistributedRuntime,
    draining: asyncio.Event,
    memory: PdMemory,
    model_path: str,
    settings: PdSettings,
) -> None:
    engine = await asyncio.to_thread(load_engine, settings.engine)
    generator = await asyncio.to_thread(engine.load_generator, Path(model_path), settings.extra_engine_args)
    client = await runtime.endpoint(endpoint_path(settings.encode_endpoint)).client()
    metrics = PdMetrics()
    resolver = make_resolver(settings, memory, EncodeClient(client), generator, metrics)
    worker = PdWorker(generator, resolver, metrics, settings)
    exposition = Exposition(metrics.registry, {"dynamo_component": "pd", "model": settings.model_name})
    control = Control(worker.drop)
    try:
        await _serve_endpoints(runtime, draining, worker, exposition, control, model_path, settings)
    finally:
        await worker.close()


def make_resolver(
    settings: PdSettings,
    memory: PdMemory,
    encode_workers: EncodeWorkers,
    generator: Generator,
    metrics: PdMetrics,
) -> ItemResolver:
    """Put the parts of the items' way together; each registers its metrics in `metrics`."""
    registry = metrics.registry
    registry.register(CacheCollector(memory.arenas))
    registry.register(memory.reader)
    if memory.what_if is not None:
        registry.register(WhatIfCollector(memory.what_if))
    receiver = Receiver(memory.cache, memory.transit, memory.what_if, generator.check_embedding, registry)
    encoders = EncodeTier(encode_workers, memory.reader, generator.fingerprint, settings, registry)
    tiers = TierChain([encoders], receiver)
    return ItemResolver(memory.cache, memory.what_if, tiers, generator.fingerprint, settings, metrics)


async def _serve_endpoints(
    runtime: DistributedRuntime,
    draining: asyncio.Event,
    worker: PdWorker,
    exposition: Exposition,
    control: Control,
    model_path: str,
    settings: PdSettings,
) -> None:
    endpoint = runtime.endpoint(endpoint_path(settings.endpoint))
    endpoint.metrics.register_prometheus_expfmt_callback(exposition.render)

    async def offer_again() -> None:
        await offer_model(endpoint, model_path, settings.model_name)
        await endpoint.register_endpoint_instance()

    await offer_model(endpoint, model_path, settings.model_name)
    logger.info(
        "PD worker ready: model %s, cache %.2f GB",
        settings.model_name,
        settings.multimodal_embedding_cache_capacity_gb,
    )
    runtime.set_health_status(True)
    await asyncio.gather(
        serve_present(
            endpoint,
            worker.handle,
            draining,
            register=offer_again,
            metrics_labels=[("model", settings.model_name)],
        ),
        serve_present(runtime.endpoint(control_path(settings.endpoint)), control.handle, draining),
    )
