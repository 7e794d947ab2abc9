"""The product's HTTP server in this process, and a peer of PD workers whose answers a test writes down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.e2e.stack import free_port
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.frontend.apis import ChatApi, TextApi
from trtllm_mm_cache.frontend.body import BodyMemory
from trtllm_mm_cache.frontend.endpoint import Completions
from trtllm_mm_cache.frontend.metrics import FrontendMetrics
from trtllm_mm_cache.frontend.models import Models
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.server import Endpoint, HttpServer, make_app
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.settings import FrontendSettings

MODEL = "tiny"
ADAPTER = "tiny-cats"
DEADLINE_S = 20

Step = dict[str, Any] | MmCacheError | asyncio.Event


@dataclass
class PeerPdWorkers:
    """PD workers on the interface of `PdWorkers`: each request gets the same `script`.

    Its steps are messages, errors to raise, and events to wait for. `asked` are the payloads that came.
    """

    script: Sequence[Step] = ()
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    instances: Sequence[int] = (1,)

    async def generate(
        self, payload: dict[str, Any], request_id: str, items: Sequence[bytes]
    ) -> AsyncGenerator[dict[str, Any]]:
        self.asked.append(dict(payload, request_id=request_id, items=list(items)))
        payload.clear()
        try:
            for step in self.script:
                if isinstance(step, MmCacheError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.closed.set()


class PeerAdapters:
    """The one adapter that PD workers have, on the interface of `AdapterDirectory`."""

    async def names(self) -> list[str]:
        return [ADAPTER]

    async def knows(self, name: str) -> bool:
        return name == ADAPTER


@dataclass
class Running:
    """A server that listens. `ended` is done when it has stopped."""

    port: int
    client: httpx2.AsyncClient
    server: HttpServer
    metrics: FrontendMetrics
    memory: BodyMemory
    ended: asyncio.Task[None]

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a bare connection for a block."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def count(self, name: str, **labels: str) -> float:
        """Return a metric."""
        return self.metrics.registry.get_sample_value(f"trtllm_mm_cache_{name}", labels) or 0


@asynccontextmanager
async def serving(prompts: Prompts, workers: PeerPdWorkers, **changes: Any) -> AsyncIterator[Running]:
    """Serve on a free port of loopback until the block ends."""
    settings = FrontendSettings(model_path="m", served_model_name=MODEL, http_port=free_port(), **changes)
    memory, metrics, models = BodyMemory(settings), FrontendMetrics(), Models(MODEL, PeerAdapters())
    completions = Completions(prompts, workers, memory, metrics, settings)  # type: ignore[arg-type]
    app = make_app(
        Endpoint(completions, ChatApi(prompts, models, settings)),
        Endpoint(completions, TextApi(prompts, models)),
        Exposition(metrics.registry, {"dynamo_component": "frontend"}),
        workers,  # type: ignore[arg-type]
        models,
    )
    server = HttpServer.of(app, settings)
    ended = asyncio.create_task(server.serve())
    url = f"http://127.0.0.1:{settings.http_port}"
    async with asyncio.timeout(DEADLINE_S):
        while not server.started:
            await asyncio.sleep(0.01)
    try:
        async with httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False) as client:
            yield Running(settings.http_port, client, server, metrics, memory, ended)
    finally:
        server.stop()
        await ended


def token_messages(prompts: Prompts, text: str, *, size: int = 1, reason: str = "stop") -> list[Step]:
    """Return a PD worker's messages for an answer of this text, `size` tokens each."""
    ids = prompts.backend.encode(text, add_special_tokens=False).ids
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)] or [[]]
    messages: list[Step] = []
    for index, piece in enumerate(pieces):
        last = {"finish_reason": reason} if index == len(pieces) - 1 else {}
        usage = {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 0}
        messages.append({"token_ids": piece, "completion_usage": usage, **last})
    return messages


def chat(text: str = "Hello", **more: Any) -> dict[str, Any]:
    """Return a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list[Any]:
    """Return the events of a stream as objects; the end as the text "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
