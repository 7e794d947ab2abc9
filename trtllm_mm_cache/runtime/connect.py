"""Dynamo's runtime in one process: connect, serve one endpoint, drain on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
from dataclasses import dataclass

from dynamo.runtime import DistributedRuntime

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.runtime.clock import watch_clock
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.secret import discovery_folder, load_membership
from trtllm_mm_cache.runtime.status import StatusServer
from trtllm_mm_cache.settings import MB, DiscoverySettings, EngineSettings
from trtllm_mm_cache.transfer.environment import one_machine_transports

__all__ = ["Deployment", "DistributedRuntime", "connect", "drain_on_signals", "endpoint_path", "join"]

logger = logging.getLogger(__name__)

# A request carries images (base64 in data: URLs, bytes to the encode worker); Dynamo's default
# of 32 MB would refuse a handful of photographs.
MAX_MESSAGE_BYTES = 512 * MB

_LISTEN_ADDRESSES = (
    "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_HOST",
    "DYN_EVENT_PLANE_HOST",
)

# Below it a few hundred idle connections leave a process no descriptor for its next call.
_DESCRIPTORS = 65_536


@dataclass(frozen=True)
class Deployment:
    """A deployment as one worker sees it: `draining` is set when it is to end."""

    runtime: DistributedRuntime
    draining: asyncio.Event
    members: Membership
    status: StatusServer


def join(settings: EngineSettings) -> Deployment:
    """Join the deployment as a worker, as `connect` does, with the secret and the system port.

    Raises `ConfigurationError`.
    """
    status = StatusServer(settings)
    runtime, members = connect(settings)
    return Deployment(runtime, drain_on_signals(runtime), members, status)


def connect(settings: DiscoverySettings) -> tuple[DistributedRuntime, Membership]:
    """Join the deployment. Call once per process, from its event loop.

    From here on the process makes files for its own user alone, and may open as many as its hard limit
    allows. Dynamo reads limits and addresses from the environment; what the operator set there stays. With
    `file` discovery all processes are on this machine: nothing listens beyond loopback, embeddings pass
    through shared memory, and other users have no access to the discovery folder. Raises
    `ConfigurationError` where there is no secret, or Dynamo cannot start with these settings.
    """
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _DESCRIPTORS), most))
    # Dynamo's server on the system port bounds nothing: `status.py` has that port, if any.
    os.environ.pop("DYN_SYSTEM_PORT", None)
    defaults = {
        "DYN_TCP_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),
        # Model cards lie in discovery, and not on the system port, which is not Dynamo's here.
        "DYN_SELF_HOST_METADATA": "0",
    }
    if settings.discovery_backend in ("file", "mem"):
        defaults |= dict.fromkeys(_LISTEN_ADDRESSES, "127.0.0.1")
        defaults |= {"UCX_TLS": one_machine_transports(), "UCX_NET_DEVICES": "lo"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    members = load_membership(settings)
    if settings.discovery_backend == "file":
        watch_clock(discovery_folder())
    try:
        runtime = DistributedRuntime(
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
    return runtime, members


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
