"""The process of a prefill+decode worker: memory, model, resolver, endpoint."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from trtllm_mm_cache.engines.base import Generator
from trtllm_mm_cache.engines.own_tower import OwnTowerGenerator
from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.registry import Engine, load_engine
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.observability.cache_metrics import CacheCollector, WhatIfCollector
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.memory import MemoryCollector
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.observability.traces import configure_tracing
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.pd.memory import OwnTowerMemory, PdMemory
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.allocator import bound_heaps
from trtllm_mm_cache.runtime.connect import Deployment, endpoint_path, join
from trtllm_mm_cache.runtime.control import CONTROL, Control, control_path
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.runtime.model import local_model_path, offer_model
from trtllm_mm_cache.runtime.presence import serve_present
from trtllm_mm_cache.runtime.readiness import announce_ready
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.configured import check_tiers, stored_tiers
from trtllm_mm_cache.tiers.encode_remote import EncodeTier, EncodeWorkers
from trtllm_mm_cache.tiers.own_tower import OwnTower
from trtllm_mm_cache.tiers.receive import Receiver

logger = logging.getLogger(__name__)


def run_pd_worker(settings: PdSettings) -> None:
    """Load the model, serve until SIGTERM or SIGINT, drain, return. Raises `ConfigurationError` at start.

    Under mpirun this is rank 0; every other rank only computes with it, and returns when it has ended.
    """
    bound_heaps()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing("pd")
    if place_in_job().rank > 0:
        load_engine(settings.engine).follow(settings.extra_engine_args)
        return
    asyncio.run(_serve(settings))


async def _serve(settings: PdSettings) -> None:
    await asyncio.to_thread(check_tiers, settings.tiers)
    deployment = join(settings)
    model_path = await local_model_path(settings.model_path)
    # Memory first: a host that cannot hold it says so before minutes of model loading. Mapping the pages of
    # 10 GB takes seconds in which Python is free to import the engine.
    importing = asyncio.create_task(asyncio.to_thread(load_engine, settings.engine))
    try:
        memory = await (OwnTowerMemory if settings.is_aggregated else PdMemory).create(settings)
    except BaseException:
        importing.cancel()
        raise
    try:
        await _serve_model(deployment, memory, await importing, Path(model_path), settings)
    finally:
        await memory.close()
        logger.info("PD worker ended")


async def _serve_model(
    deployment: Deployment,
    memory: PdMemory | OwnTowerMemory,
    engine: Engine,
    model_path: Path,
    settings: PdSettings,
) -> None:
    runtime, members = deployment.runtime, deployment.members
    metrics = PdMetrics()
    generator: Generator
    if isinstance(memory, OwnTowerMemory):
        load = partial(engine.load_own_tower, kept=memory.what_if is not None)
        generator = own = await asyncio.to_thread(load, model_path, settings.extra_engine_args)
        resolver = make_own_tower_resolver(settings, memory, own, metrics)
    else:
        generator = await asyncio.to_thread(engine.load_generator, model_path, settings.extra_engine_args)
        client = await runtime.endpoint(endpoint_path(settings.encode_endpoint)).client()
        resolver = make_resolver(settings, memory, EncodeClient(client, members), generator, metrics)
    adapters = await _adapters(generator, settings)
    me = runtime.endpoint(endpoint_path(settings.endpoint)).connection_id()
    admit = partial(members.admit, me, required=not settings.allow_unproven_requests)
    worker = PdWorker(generator, resolver, metrics, settings, admit, adapters)
    exposition = Exposition(metrics.registry, {"dynamo_component": "pd", "model": settings.model_name})
    control = Control(worker.drop, adapters)
    offer = partial(offer_model, model_path=str(model_path), name=settings.model_name, adapters=adapters)
    try:
        deployment.status.render = exposition.render
        await _while_alive(generator, _serve_endpoints(deployment, worker, control, offer, settings))
    finally:
        await worker.close()


async def _adapters(generator: Generator, settings: PdSettings) -> Sequence[str]:
    """Return the generator's adapters. Raises `ConfigurationError`, and closes the generator then."""
    try:
        return _told_apart(await generator.load_adapters(), settings.model_name)
    except BaseException:
        await generator.close()
        raise


def _told_apart(adapters: Sequence[str], model: str) -> Sequence[str]:
    """Return `adapters` unless one has the model's name, or two are one to Dynamo's discovery."""
    seen: dict[str, str] = {}
    for name in adapters:
        same = model if name == model else seen.setdefault(re.sub("[^a-z0-9_-]", "_", name.lower()), name)
        if same != name or name == model:
            raise ConfigurationError(
                f"lora_modules: {name} and {same} are one name to discovery; give the adapter another one"
            )
    return adapters


async def _while_alive(generator: Generator, serving: Coroutine[Any, Any, None]) -> None:
    """Serve until `serving` ends, or the engine's processes do: then raise `EngineLostError`."""
    served, failed = asyncio.create_task(serving), asyncio.create_task(generator.failed())
    try:
        await asyncio.wait({served, failed}, return_when=asyncio.FIRST_COMPLETED)
        await (failed if failed.done() else served)
    finally:
        for task in (served, failed):
            task.cancel()
        await asyncio.gather(served, failed, return_exceptions=True)


def make_resolver(
    settings: PdSettings,
    memory: PdMemory,
    encode_workers: EncodeWorkers,
    generator: Generator,
    metrics: PdMetrics,
) -> ItemResolver:
    """Put the parts of the items' way together; each registers its metrics in `metrics`."""
    registry = metrics.registry
    _register_memory(registry, memory)
    registry.register(memory.reader)
    receiver = Receiver(memory.cache, memory.transit, memory.what_if, generator.check_embedding, registry)
    fingerprint = pixels_fingerprint(generator.fingerprint, settings.images)
    encoders = EncodeTier(encode_workers, memory.reader, fingerprint, settings, registry)
    sizes = [manager.budget_bytes for manager in memory.arenas.values()]
    stored = stored_tiers(settings.tiers, fingerprint, registry, arenas=sizes)
    tiers = TierChain([encoders], receiver, stored)
    return ItemResolver(memory.cache, memory.what_if, tiers, fingerprint, settings, metrics)


def make_own_tower_resolver(
    settings: PdSettings, memory: OwnTowerMemory, generator: OwnTowerGenerator, metrics: PdMetrics
) -> ItemResolver:
    """Do the same for an aggregated worker."""
    _register_memory(metrics.registry, memory)
    fingerprint = pixels_fingerprint(generator.fingerprint, settings.images)
    sizes = [manager.budget_bytes for manager in memory.arenas.values()]
    stored = stored_tiers(settings.tiers, fingerprint, metrics.registry, arenas=sizes)
    tower = OwnTower(memory.cache, memory.what_if, generator, settings, metrics.registry, stored)
    return ItemResolver(memory.cache, memory.what_if, tower, fingerprint, settings, metrics)


def _register_memory(registry: CollectorRegistry, memory: PdMemory | OwnTowerMemory) -> None:
    registry.register(CacheCollector(memory.arenas))
    registry.register(MemoryCollector())
    if memory.what_if is not None:
        registry.register(WhatIfCollector(memory.what_if))


async def _serve_endpoints(
    deployment: Deployment,
    worker: PdWorker,
    control: Control,
    offer: Callable[[Any], Awaitable[None]],
    settings: PdSettings,
) -> None:
    runtime, draining = deployment.runtime, deployment.draining
    endpoint = runtime.endpoint(endpoint_path(settings.endpoint))
    guarded_control = deployment.members.guarded(CONTROL, endpoint.connection_id(), control.handle)

    async def offer_again() -> None:
        await offer(endpoint)
        await endpoint.register_endpoint_instance()

    await offer(endpoint)
    logger.info(
        "PD worker ready: model %s, cache %.2f GB",
        settings.model_name,
        settings.multimodal_embedding_cache_capacity_gb,
    )
    announce_ready(deployment.status)
    await asyncio.gather(
        serve_present(
            endpoint,
            worker.handle,
            draining,
            register=offer_again,
            metrics_labels=[("model", settings.model_name)],
        ),
        serve_present(runtime.endpoint(control_path(settings.endpoint)), guarded_control, draining),
    )
