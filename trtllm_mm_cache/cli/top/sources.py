"""Where `top` gets the workers' metrics from: their system ports, or discovery and the control endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import httpx2

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.settings import TopSettings

Texts = Mapping[str, str | MmCacheError]
"""By the worker's name: its exposition, or why there is none."""


class Source(Protocol):
    """The workers of a deployment."""

    async def read(self) -> Texts:
        """Return every known worker's exposition of this moment; a worker that is away is an error in it."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class AwayError(MmCacheError):
    """A worker did not give its metrics."""

    code = "worker_away"


class UrlSource:
    """Workers by the addresses of their system ports: `host:port` or a whole URL."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float) -> None:
        self._urls = {url.removeprefix("http://").partition("/")[0]: _whole(url) for url in urls}
        self._client = httpx2.AsyncClient(timeout=timeout_s, trust_env=False)

    async def read(self) -> Texts:
        """Scrape all at the same time."""
        texts = await asyncio.gather(*(self._scrape(url) for url in self._urls.values()))
        return dict(zip(self._urls, texts, strict=True))

    async def close(self) -> None:
        """Close connections."""
        await self._client.aclose()

    async def _scrape(self, url: str) -> str | MmCacheError:
        try:
            answer = await self._client.get(url)
        except httpx2.HTTPError as error:
            return AwayError(type(error).__name__)
        if answer.status_code != httpx2.codes.OK:
            return AwayError(f"HTTP {answer.status_code}")
        return answer.text


class DiscoverySource:
    """Workers as discovery names them, asked through their control endpoints."""

    def __init__(self, settings: TopSettings) -> None:
        from trtllm_mm_cache.runtime.connect import connect
        from trtllm_mm_cache.runtime.control_client import ControlClient

        self._runtime, self._members = connect(settings)
        self._endpoints = {"PD": settings.endpoint, "encode": settings.encode_endpoint}
        self._connect = ControlClient.connect
        self._clients: list[ControlClient] = []
        self._timeout_s = settings.timeout_s
        self._wait_s = settings.discovery_wait_s

    async def read(self) -> Texts:
        """Ask all at the same time; only the first call waits for discovery."""
        if not self._clients:
            for role, endpoint in self._endpoints.items():
                self._clients.append(await self._connect(self._runtime, role, endpoint, self._members))
        wait_s, self._wait_s = self._wait_s, 0.0
        texts = await asyncio.gather(*(client.metrics(wait_s, self._timeout_s) for client in self._clients))
        return {name: text for each in texts for name, text in each.items()}

    async def close(self) -> None:
        """Leave the deployment."""
        self._runtime.shutdown()


def make_source(settings: TopSettings) -> Source:
    """Return the source that `settings` name: addresses where there are any, else discovery."""
    if settings.url:
        return UrlSource(settings.url, timeout_s=settings.timeout_s)
    return DiscoverySource(settings)


def _whole(url: str) -> str:
    whole = url if "://" in url else f"http://{url}"
    return whole if whole.count("/") > 2 else f"{whole}/metrics"
