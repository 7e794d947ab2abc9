"""Dynamo's runtime in one process: connect, serve one endpoint, drain on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from dynamo.runtime import Context, DistributedRuntime

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import MB, RuntimeSettings

logger = logging.getLogger(__name__)

# A request carries images (base64 in data: URLs, bytes to the encode worker); Dynamo's default
# of 32 MB would refuse a handful of photographs.
MAX_MESSAGE_BYTES = 512 * MB

_LISTEN_ADDRESSES = (
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
    "DYN_SYSTEM_HOST",
)

T = TypeVar("T")


def connect(settings: RuntimeSettings) -> DistributedRuntime:
    """Join the deployment. Call once per process, from its event loop.

    Dynamo reads limits and addresses from the environment; what the operator set there stays. With
    `file` discovery all processes are on this machine, and nothing listens beyond loopback. Raises
    `ConfigurationError` where Dynamo cannot start with these settings.
    """
    defaults = {
        "DYN_TCP_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),
        "DYN_HTTP_BODY_LIMIT_MB": str(MAX_MESSAGE_BYTES // MB),
    }
    if settings.discovery_backend in ("file", "mem"):
        defaults |= dict.fromkeys(_LISTEN_ADDRESSES, "127.0.0.1") | {"UCX_NET_DEVICES": "lo"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        return DistributedRuntime(
            asyncio.get_running_loop(),
            settings.discovery_backend,
            settings.request_plane,
            event_plane=settings.event_plane,
        )
    except Exception as error:  # Dynamo raises bare exceptions
        raise ConfigurationError(
            f"cannot join a deployment by {settings.discovery_backend} discovery: {error}; "
            "docs/deployment.md says what it needs"
        ) from error


def endpoint_path(url: str) -> str:
    """Return `namespace.component.endpoint` of a dyn:// URL (the scheme may be left out)."""
    path = url.removeprefix("dyn://")
    if len([part for part in path.split(".") if part]) != 3:
        raise ConfigurationError(f"'{url}' is no endpoint; write dyn://namespace.component.endpoint")
    return path


def drain_on_signals(runtime: DistributedRuntime) -> asyncio.Event:
    """On SIGTERM, SIGINT or SIGUSR1 take nothing new, finish what runs, and let `serve_endpoint` return.

    The event that is returned is set from then on. SIGUSR1 is for workers under mpirun: it passes that on,
    but kills its ranks half a second after any of the others.
    """
    loop = asyncio.get_running_loop()
    draining = asyncio.Event()

    def drain(name: str) -> None:
        logger.info("%s: draining; requests that run are finished, new ones go elsewhere", name)
        draining.set()
        runtime.shutdown()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        loop.add_signal_handler(number, drain, number.name)
    return draining


class RequestStoppedError(Exception):
    """The client is gone or has cancelled; nobody reads the answer."""


async def until_stopped(context: Context, work: Awaitable[T]) -> T:
    """Await `work`, but no longer than somebody wants the answer.

    Raises `RequestStoppedError` when the request's context is stopped or killed first; `work` is
    then cancelled and has ended when this returns.
    """
    stopped = asyncio.ensure_future(context.async_killed_or_stopped())
    try:
        return await _first(asyncio.ensure_future(work), stopped)
    finally:
        stopped.cancel()


async def stream_until_stopped(context: Context, stream: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yield what `stream` yields, but no longer than somebody wants the answer.

    Raises `RequestStoppedError` at the moment the request is stopped, also while the next item is
    awaited. `stream` is closed when this ends, however it ends.
    """
    stopped = asyncio.ensure_future(context.async_killed_or_stopped())
    try:
        while True:
            try:
                item = await _first(asyncio.ensure_future(anext(stream)), stopped)
            except StopAsyncIteration:
                return
            yield item
    finally:
        stopped.cancel()
        await stream.aclose()


async def _first(work: asyncio.Future[T], stopped: asyncio.Future[bool]) -> T:
    try:
        either: set[asyncio.Future[Any]] = {work, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise RequestStoppedError
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
