"""Frontend, PD worker and encode worker with the defaults of one machine, for those who attack them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from dynamo.runtime import Client, DistributedRuntime

from tests.e2e.cards import MAX_TOKENS
from tests.e2e.stack import REPOSITORY, free_port, message, wait_until
from tests.services import CLI, WITH_US, Service
from trtllm_mm_cache.runtime.connect import endpoint_path
from trtllm_mm_cache.settings import DEFAULT_ENCODE_ENDPOINT, DEFAULT_PD_ENDPOINT

MODEL = REPOSITORY / "models/shapes-qwen2-vl"
ARGS = REPOSITORY / "configs/cpu-demo"
READY_S = 240  # on a busy machine
CACHE = ("--multimodal-embedding-cache-capacity-gb", "0.03125")


@dataclass
class Deployment:
    """The processes. `prefix` went before each of their commands."""

    folder: Path
    environment: dict[str, str]
    prefix: tuple[str, ...]
    frontend: Service
    pd: Service
    encode: Service
    client: openai.OpenAI

    @property
    def discovery(self) -> Path:
        """The discovery folder."""
        return Path(self.environment["DYN_FILE_KV"])

    @property
    def services(self) -> tuple[Service, ...]:
        """Every process."""
        return self.encode, self.pd, self.frontend

    def ask(self, *parts: Any) -> str:
        """Ask and return the answer."""
        answer = self.client.chat.completions.create(
            model=MODEL.name, messages=[message(*parts)], max_tokens=MAX_TOKENS, temperature=0
        )
        return answer.choices[0].message.content or ""

    def another(self, name: str, role: str, *options: str, **environment: str) -> Service:
        """Return one more worker, which has not started."""
        service = worker(name, role, self.folder, {**self.environment, **environment}, self.prefix)
        service.command = [*service.command, *options]
        return service

    def encodes(self) -> float:
        """How often the encode worker has run its tower."""
        return self.encode.process.metric("trtllm_mm_cache_encodes_total")

    def entries(self) -> tuple[float, float]:
        """How many embeddings encode worker and PD worker have stored."""
        name = "dynamo_component_embedding_cache_entries"
        return self.encode.process.metric(name), self.pd.process.metric(name)


def worker(
    name: str, role: str, folder: Path, environment: dict[str, str], prefix: tuple[str, ...]
) -> Service:
    """Return a worker of the demo model."""
    options = ["--model-path", str(MODEL), "--extra-engine-args", str(ARGS / f"{role}.yaml"), *CACHE]
    ready = "PD worker ready" if role == "pd" else "encode worker ready"
    return Service(name, [*prefix, *CLI, role, *options], folder, ready, environment, free_port())


@contextmanager
def deployed(folder: Path, *, prefix: tuple[str, ...] = WITH_US, **variables: str) -> Iterator[Deployment]:
    """Start everything, each command behind `prefix`, and end it however the test ends."""
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_LOG": "error",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        **variables,
    }
    port = free_port()
    frontend = Service(
        "frontend", [*prefix, *CLI, "frontend", "--http-port", str(port)], folder, "listens", environment
    )
    pd = worker("pd", "pd", folder, environment, prefix)
    encode = worker("encode", "encode", folder, environment, prefix)
    with ExitStack() as stack:
        for service in (frontend, pd, encode):
            service.start()
            stack.callback(service.kill)
        for service in (frontend, pd, encode):
            service.wait_ready(READY_S)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0
        )
        stack.callback(client.close)
        deployment = Deployment(folder, environment, prefix, frontend, pd, encode, client)
        wait_until(lambda: _serves(deployment), 60, "the deployment does not serve")
        yield deployment


def _serves(deployment: Deployment) -> bool:
    try:
        deployment.ask("What is this?")
    except openai.APIError:
        return False
    return deployment.pd.process.metric("trtllm_mm_cache_encode_workers") == 1


@asynccontextmanager
async def caller(endpoint: str) -> AsyncIterator[Client]:
    """Return a client of Dynamo's that sees at least one instance of `endpoint` in DYN_FILE_KV."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    try:
        client = await runtime.endpoint(endpoint_path(endpoint)).client()
        async with asyncio.timeout(10):
            await client.wait_for_instances()
        yield client
    finally:
        runtime.shutdown()


async def answers(client: Client, payload: Any, instance: int) -> list[Any]:
    """Call one instance and return its whole answer."""
    async with asyncio.timeout(20):
        stream = await client.direct(payload, instance)
        return [item.data() if hasattr(item, "data") else item async for item in stream]


def idle_connections(port: int, count: int) -> list[socket.socket]:
    """Open connections that say nothing."""
    return [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(count)]


def descriptors(service: Service) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{service.popen.pid}/fd"))


ENDPOINTS = {"encode": DEFAULT_ENCODE_ENDPOINT, "pd": DEFAULT_PD_ENDPOINT}
