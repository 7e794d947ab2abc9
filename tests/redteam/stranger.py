"""Another user of the machine, who knows everything of a deployment but its secret.

    python -m tests.redteam.stranger JSON

Run as root: it imports what it needs, then becomes the user `nobody` for good, and tries. Addresses and
instance ids it has from a copy of the discovery folder, and NIXL's metadata from whoever tells it: a
stranger would have to guess them. Prints what each try gave, as JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.redteam.deployment import ENDPOINTS, answers, caller
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.control_client import ControlClient
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.settings import DEFAULT_ENCODE_ENDPOINT, DEFAULT_PD_ENDPOINT
from trtllm_mm_cache.transfer import Export, PeerMetadata, Reader, TransferAgent
from trtllm_mm_cache.transfer.environment import load_nixl, prepare_environment

NOBODY = 65534
OWN_SECRET = b"what a stranger takes for the secret"


def become_nobody() -> None:
    """Give up every right of root."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = "/nonexistent"


async def call(told: dict[str, Any], role: str) -> Any:
    """Call a worker's own endpoint, without a proof and with one by another secret."""
    payload = told[role]
    if role == "encode":
        payload |= {"media": base64.b64decode(payload["media"])}
    async with caller(ENDPOINTS[role]) as client:
        (instance,) = client.instance_ids()
        sealed = Membership(OWN_SECRET).call(role, instance).seal({**payload, "media": ""})
        return [await _answer(client, each, instance) for each in (payload, sealed)]


async def _answer(client: Any, payload: Any, instance: int) -> Any:
    try:
        return await answers(client, payload, instance)
    except Exception as error:  # noqa: BLE001 - Dynamo raises bare ones
        return str(error)


async def drop(told: dict[str, Any]) -> Any:
    """Drop everything on both workers."""
    from dynamo.runtime import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    results = []
    for url in (DEFAULT_ENCODE_ENDPOINT, DEFAULT_PD_ENDPOINT):
        client = await ControlClient.connect(runtime, "worker", url, Membership(OWN_SECRET))
        for worker in await client.workers(wait_s=5):
            request = DropRequest(everything=True)
            try:
                await client.call(worker, request, DropReport, timeout_s=10)
                results.append("dropped")
            except MmCacheError as error:
                results.append(error.code)
    runtime.shutdown()
    return results


async def read(told: dict[str, Any]) -> Any:
    """READ an export by NIXL, with true metadata, whichever transport gets there."""
    results = {}
    for transports in told["transports"]:
        os.environ["UCX_TLS"] = transports
        agent = await TransferAgent.start()
        arena = Arena(told["export"]["nbytes"])
        await agent.register(arena.base_address, arena.capacity_bytes)
        reader = Reader(agent)
        export, peer = Export(**told["export"]), PeerMetadata.from_wire(told["peer"])
        try:
            begun = reader.begin(peer, export, arena.base_address, deadline_s=5)
            async with asyncio.timeout(6):
                await asyncio.wrap_future(begun.outcome)
            results[transports] = ctypes.string_at(arena.base_address, 64).hex()
        except (MmCacheError, TimeoutError) as error:
            results[transports] = type(error).__name__
        with contextlib.suppress(MmCacheError):
            await agent.close(deadline_s=0)
    return results


async def look(told: dict[str, Any]) -> Any:
    """Open files and list folders."""
    return {path: _look(Path(path)) for path in told["paths"]}


def _look(path: Path) -> str:
    try:
        if path.is_dir():
            return f"lists {len(list(path.iterdir()))}"
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return type(error).__name__
    return "read"


async def vm_read(told: dict[str, Any]) -> Any:
    """Read the exporter's memory as UCX's CMA does."""

    class Span(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(64)
    local, remote = Span(ctypes.addressof(buffer), 64), Span(told["export"]["address"], 64)
    count = libc.process_vm_readv(told["pid"], ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return os.strerror(ctypes.get_errno()) if count < 0 else buffer.raw.hex()


TRIES: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
    "encode": lambda told: call(told, "encode"),
    "generate": lambda told: call(told, "pd"),
    "drop": drop,
    "read": read,
    "vm_read": vm_read,
    "look": look,
}


def main() -> None:
    """Try what the caller names, as nobody."""
    told = json.loads(sys.argv[1])
    prepare_environment()
    load_nixl()  # the interpreter itself may lie where nobody cannot go
    become_nobody()

    async def tries() -> dict[str, Any]:
        return {name: await TRIES[name](told) for name in told["tries"]}

    print(json.dumps(asyncio.run(tries()), default=repr), flush=True)
    os._exit(0)  # Dynamo's threads would import what nobody may not read


if __name__ == "__main__":
    main()
