"""The process of an encode worker: model, arena, NIXL agent, endpoint."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.arena.limits import check_fits
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.encode.pipeline import EncodePipeline
from trtllm_mm_cache.encode.server import EncodeServer
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.memory import MemoryCollector
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.observability.traces import configure_tracing
from trtllm_mm_cache.runtime.allocator import bound_heaps
from trtllm_mm_cache.runtime.connect import endpoint_path, join
from trtllm_mm_cache.runtime.control import CONTROL, Control, control_path
from trtllm_mm_cache.runtime.messages import ENCODE
from trtllm_mm_cache.runtime.model import local_model_path
from trtllm_mm_cache.runtime.presence import serve_present
from trtllm_mm_cache.runtime.readiness import announce_ready
from trtllm_mm_cache.settings import GB, EncodeSettings
from trtllm_mm_cache.tiers.configured import check_tiers, stored_tiers
from trtllm_mm_cache.transfer import Exporter, TransferAgent

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 5.0


def run_encode_worker(settings: EncodeSettings) -> None:
    """Load the model, serve until SIGTERM or SIGINT, drain, return. Raises `ConfigurationError` at start."""
    bound_heaps()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing("encode")
    asyncio.run(_serve(settings))


async def _serve(settings: EncodeSettings) -> None:
    await asyncio.to_thread(check_tiers, settings.tiers)
    deployment = join(settings)
    model_path = await local_model_path(settings.model_path)
    await asyncio.to_thread(check_fits, settings.arena_bytes)
    engine = await asyncio.to_thread(load_engine, settings.engine)
    encoder = await asyncio.to_thread(
        engine.load_vision_encoder, Path(model_path), settings.extra_engine_args
    )
    capacity = int(settings.multimodal_embedding_cache_capacity_gb * GB)
    policy = make_policy(settings.multimodal_embedding_cache_policy, capacity)
    manager = await asyncio.to_thread(MultimodalEmbeddingCacheManager, capacity, policy=policy)
    await asyncio.to_thread(manager.arena.page_lock)
    agent = await TransferAgent.start()
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    registry = CollectorRegistry()
    exporter = Exporter(agent, lease_timeout_s=settings.lease_timeout_s)
    registry.register(exporter)
    registry.register(MemoryCollector())
    tiers = stored_tiers(
        settings.tiers,
        pixels_fingerprint(encoder.fingerprint, settings.images),
        registry,
        arenas=[capacity],
    )
    pipeline = EncodePipeline(encoder, manager, settings, registry, tiers)
    peer = agent.metadata.with_arena(manager.arena.place)
    server = EncodeServer(pipeline, exporter, peer, EncodeMetrics(registry))
    exposition = Exposition(registry, {"dynamo_component": "encode", "model": Path(model_path).name})
    endpoint = deployment.runtime.endpoint(endpoint_path(settings.endpoint))
    control_endpoint = deployment.runtime.endpoint(control_path(settings.endpoint))
    control = Control(server.drop)
    me, guarded, draining = endpoint.connection_id(), deployment.members.guarded, deployment.draining
    deployment.status.render = exposition.render
    logger.info(
        "encode worker ready: arena %.2f GB, fingerprint %s…", capacity / GB, pipeline.fingerprint[:12]
    )
    announce_ready(deployment.status)
    try:
        await asyncio.gather(
            serve_present(endpoint, guarded(ENCODE, me, server.handle), draining),
            serve_present(control_endpoint, guarded(CONTROL, me, control.handle), draining),
        )
    finally:
        await pipeline.close()
        encoder.close()
        await agent.close(deadline_s=_CLOSE_DEADLINE_S)
        manager.close()
        logger.info("encode worker ended")
