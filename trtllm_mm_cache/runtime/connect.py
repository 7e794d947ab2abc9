"""Dynamo's runtime in one process: connect, serve one endpoint, drain on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from dynamo.runtime import DistributedRuntime

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import MB, DiscoverySettings

__all__ = ["DistributedRuntime", "connect", "drain_on_signals", "endpoint_path"]

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


def connect(settings: DiscoverySettings) -> DistributedRuntime:
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
            os.environ.get("DYN_REQUEST_PLANE", "tcp"),
            event_plane=os.environ.get("DYN_EVENT_PLANE", "zmq"),
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


def drain_on_signals(runtime: DistributedRuntime | None) -> asyncio.Event:
    """On SIGTERM, SIGINT or SIGUSR1 take nothing new, finish what runs, and let `serve_endpoint` return.

    The event that is returned is set from then on; without a `runtime` that is all. SIGUSR1 is for workers
    under mpirun: it passes that on, but kills its ranks half a second after any of the others.
    """
    loop = asyncio.get_running_loop()
    draining = asyncio.Event()

    def drain(name: str) -> None:
        logger.info("%s: draining; requests that run are finished, new ones go elsewhere", name)
        draining.set()
        if runtime is not None:
            runtime.shutdown()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        loop.add_signal_handler(number, drain, number.name)
    return draining
