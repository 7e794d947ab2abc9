"""The process of a frontend: model files, PD workers, HTTP server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import uvloop

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.frontend.apis import ChatApi, TextApi
from trtllm_mm_cache.frontend.body import BodyMemory
from trtllm_mm_cache.frontend.endpoint import Completions
from trtllm_mm_cache.frontend.metrics import BodyMemoryCollector, FrontendMetrics
from trtllm_mm_cache.frontend.models import Models
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.server import Endpoint, HttpServer, make_app
from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.observability.traces import configure_tracing
from trtllm_mm_cache.runtime.adapters import AdapterDirectory
from trtllm_mm_cache.runtime.allocator import bound_heaps
from trtllm_mm_cache.runtime.connect import connect, drain_on_signals, endpoint_path
from trtllm_mm_cache.runtime.control_client import ControlClient
from trtllm_mm_cache.runtime.model import local_model_path
from trtllm_mm_cache.runtime.pd_client import PdWorkers
from trtllm_mm_cache.settings import FrontendSettings

logger = logging.getLogger(__name__)


def run_frontend(settings: FrontendSettings) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, finish what runs, and return.

    Raises `ConfigurationError` for a model without tokenizer or template, and for a port that is taken.
    """
    bound_heaps()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing("frontend")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: FrontendSettings) -> None:
    runtime, members = connect(settings)
    model_path = Path(await local_model_path(settings.model_path, weights=False))
    prompts = await asyncio.to_thread(Prompts.from_model, model_path)
    client = await runtime.endpoint(endpoint_path(settings.pd_endpoint)).client()
    control = await ControlClient.connect(runtime, "PD", settings.pd_endpoint, members)
    adapters = AdapterDirectory(control, client.instance_ids)
    workers, memory, metrics = PdWorkers(client, members, adapters), BodyMemory(settings), FrontendMetrics()
    models = Models(settings.model_name, adapters)
    for part in (workers, BodyMemoryCollector(memory), prompts.admission):
        metrics.registry.register(part)
    completions = Completions(prompts, workers, memory, metrics, settings)
    app = make_app(
        Endpoint(completions, ChatApi(prompts, models, settings)),
        Endpoint(completions, TextApi(prompts, models)),
        Exposition(metrics.registry, {"dynamo_component": "frontend", "model": settings.model_name}),
        workers,
        models,
    )
    server = HttpServer.of(app, settings)
    draining = drain_on_signals(None)  # answers that run still need the runtime
    stopping = asyncio.create_task(_stop_when(draining, server))
    try:
        await _listen(server, settings)
    finally:
        stopping.cancel()
        runtime.shutdown()


async def _listen(server: HttpServer, settings: FrontendSettings) -> None:
    logger.info("frontend listens on http://%s:%d", settings.http_host, settings.http_port)
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that it cannot listen; it has logged why
        raise ConfigurationError(
            f"cannot listen on {settings.http_host}:{settings.http_port}: the port is taken or the address "
            "is not this machine's; set --http-port or --http-host"
        ) from None


async def _stop_when(draining: asyncio.Event, server: HttpServer) -> None:
    await draining.wait()
    server.stop()
