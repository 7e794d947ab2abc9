"""Finding all workers of a deployment and calling their control endpoints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dynamo.runtime import Client, DistributedRuntime

from trtllm_mm_cache.errors import MmCacheError, from_wire
from trtllm_mm_cache.runtime.control import CONTROL, control_path
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.messages import EncodeFault, Message, parse
from trtllm_mm_cache.settings import ControlSettings

# Discovery tells of instances one by one; they have all come when none has for this long.
_SETTLED_S = 0.3

Answer = TypeVar("Answer", bound=Message)


class WorkerUnreachableError(MmCacheError):
    """A worker that discovery names did not answer."""

    code = "worker_unreachable"


@dataclass(frozen=True)
class Worker:
    """One worker: its role, for people, and its instance id in Dynamo."""

    role: str
    instance: int

    def __str__(self) -> str:
        return f"{self.role} worker {self.instance:x}"


class ControlClient:
    """Calls the workers of one component. For use from one event loop."""

    def __init__(self, role: str, client: Client, members: Membership) -> None:
        self._role = role
        self._client = client
        self._members = members

    @classmethod
    async def connect(
        cls, runtime: DistributedRuntime, role: str, endpoint_url: str, members: Membership
    ) -> ControlClient:
        """Begin to watch the component of `endpoint_url`; `role` names its workers."""
        return cls(role, await runtime.endpoint(control_path(endpoint_url)).client(), members)

    async def workers(self, *, wait_s: float) -> Sequence[Worker]:
        """Return the workers alive, having waited for the first of them, but at most `wait_s` seconds."""
        loop = asyncio.get_running_loop()
        known: list[int] = []
        give_up, settled = loop.time() + wait_s, loop.time() + wait_s
        while loop.time() < (settled if known else give_up):
            now = sorted(self._client.instance_ids())
            if now != known:
                known, settled = now, loop.time() + _SETTLED_S
            await asyncio.sleep(0.02)
        return [Worker(self._role, instance) for instance in sorted(self._client.instance_ids())]

    async def call(
        self, worker: Worker, request: Message, report: type[Answer], *, timeout_s: float
    ) -> Answer:
        """Send one request to one worker and return its report.

        Raises the error that the worker reports, `NotAMemberError`, or `WorkerUnreachableError`.
        """
        call = self._members.call(CONTROL, worker.instance)
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self._client.direct(call.seal(request.model_dump()), worker.instance)
                async for item in stream:
                    return _parse(call.open(item.data() if hasattr(item, "data") else item), report)
        except TimeoutError:
            raise WorkerUnreachableError(f"{worker} did not answer within {timeout_s:g} seconds") from None
        except MmCacheError:
            raise
        except Exception as error:  # Dynamo raises bare exceptions for a lost connection
            raise WorkerUnreachableError(f"{worker} cannot be reached") from error
        raise WorkerUnreachableError(f"{worker} ended its answer without a report")


def _parse(payload: Any, report: type[Answer]) -> Answer:
    if isinstance(payload, dict) and payload.get("status") == "error":
        fault = parse(EncodeFault, payload)
        raise from_wire({"code": fault.code, "message": fault.message})
    return parse(report, payload)


class NoWorkerFoundError(MmCacheError):
    """Discovery names no worker."""

    code = "no_worker_found"


def no_worker_found(settings: ControlSettings) -> NoWorkerFoundError:
    """Return the error of a command that needs workers and found none where `settings` look for them."""
    found = f"no worker of {settings.endpoint} or {settings.encode_endpoint} was found"
    where, way_out = _place(settings)
    return NoWorkerFoundError(
        f"{found} {where} within {settings.discovery_wait_s:g} s. This command must look where the workers "
        f"register: {way_out}"
    )


def _place(settings: ControlSettings) -> tuple[str, str]:
    """Return where discovery looks, and the way out, as parts of a sentence."""
    match settings.discovery_backend:
        case "file":
            return f"in {os.environ.get('DYN_FILE_KV')} (DYN_FILE_KV)", (
                "set DYN_FILE_KV to their folder (launch/disagg_e_pd.sh prints the line to copy), or "
                "DYN_DISCOVERY_BACKEND if they use another kind of discovery"
            )
        case "etcd":
            servers = os.environ.get("ETCD_ENDPOINTS", "http://localhost:2379, ETCD_ENDPOINTS not being set")
            return f"in etcd ({servers})", "set ETCD_ENDPOINTS as they have it"
        case "kubernetes":
            return f"among the ready pods of the namespace {os.environ.get('POD_NAMESPACE', 'default')}", (
                "run it in one of their pods (kubectl exec), and look at the pods' readiness"
            )
        case "mem":
            return "in this process's own memory", "`mem` cannot reach another process; use `file` or `etcd`"
