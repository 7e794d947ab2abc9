"""The frontend: Dynamo's OpenAI-compatible HTTP server, embedded."""

from __future__ import annotations

import asyncio
import logging

from dynamo.llm import EngineType, EntrypointArgs, make_engine, run_input

from trtllm_mm_cache.observability.logs import configure_logging
from trtllm_mm_cache.runtime.connect import connect, drain_on_signals
from trtllm_mm_cache.settings import FrontendSettings

logger = logging.getLogger(__name__)


def run_frontend(settings: FrontendSettings) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, finish what runs, and return."""
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(_serve(settings))


async def _serve(settings: FrontendSettings) -> None:
    runtime, _ = connect(settings)  # Dynamo's server cannot prove anything: PD workers must allow that
    drain_on_signals(runtime)
    engine = await make_engine(
        runtime,
        EntrypointArgs(EngineType.Dynamic, http_host=settings.http_host, http_port=settings.http_port),
    )
    logger.info("frontend listens on http://%s:%d", settings.http_host, settings.http_port)
    await run_input(runtime, "http", engine)
