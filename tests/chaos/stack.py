"""The stack under chaos: one frontend, PD workers, encode workers, each a process that can be restarted."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.questions import MODEL
from tests.e2e.stack import free_port, pd_workers_seen, wait_until
from tests.services import CLI, WITH_US, Service

CACHE_GB = "0.001"
"""So small that entries are evicted all the time."""
TRANSFER_TIMEOUT_S = 2
LEASE_TIMEOUT_S = 3 * TRANSFER_TIMEOUT_S  # of the encode workers
ENCODE_TIMEOUT_S = 8


@dataclass
class ChaosStack:
    """All processes, and the API's URL."""

    url: str
    frontend: Service
    pd_workers: list[Service]
    encode_workers: list[Service]

    @property
    def workers(self) -> list[Service]:
        """What is killed and frozen."""
        return [*self.pd_workers, *self.encode_workers]


@contextmanager
def chaos_stack(
    folder: Path,
    pd_workers: int,
    encode_workers: int,
    ucx_tls: str | None,
    chunk_bytes: int | None = None,
    **more: Sequence[str],
) -> Iterator[ChaosStack]:
    """Start the processes; in the end kill what still runs. `ready` says when they serve.

    With `chunk_bytes` PD workers READ in chunks of that size. `more` are further options, by `frontend`, `pd`
    and `encode`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_LOG": "warn",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "HF_HUB_OFFLINE": "1",
        **({"UCX_TLS": ucx_tls} if ucx_tls else {}),
    }
    ports = iter(_system_ports(pd_workers + encode_workers))
    common = ("--model-path", str(MODEL), "--transfer-timeout-s", str(TRANSFER_TIMEOUT_S))
    cache = ("--multimodal-embedding-cache-capacity-gb", CACHE_GB)

    small_chunks = (sys.executable, "-m", "tests.chaos.small_chunks", str(chunk_bytes))

    def service(name: str, ready: str, *arguments: str, system_port: int = 0) -> Service:
        cli = small_chunks if chunk_bytes and arguments[0] == "pd" else CLI
        return Service(name, (*WITH_US, *cli, *arguments), folder, ready, environment, system_port)

    def pd_worker(number: int) -> Service:
        options = (*common, *cache, "--encode-timeout-s", str(ENCODE_TIMEOUT_S), "--transfer-arena-mb", "8")
        options = (*options, *more.get("pd", ()))
        return service(f"PD-{number}", "PD worker ready", "pd", *options, system_port=next(ports))

    def encode_worker(number: int) -> Service:
        options = (*common, *cache, *more.get("encode", ()))
        return service(f"encode-{number}", "encode worker ready", "encode", *options, system_port=next(ports))

    stack = ChaosStack(
        f"http://127.0.0.1:{port}/v1",
        service(
            *("frontend", "frontend listens", "frontend", "--model-path", str(MODEL)),
            *("--http-port", str(port), *more.get("frontend", ())),
        ),
        [pd_worker(number) for number in range(1, pd_workers + 1)],
        [encode_worker(number) for number in range(1, encode_workers + 1)],
    )
    with ExitStack() as started:
        for each in (stack.frontend, *stack.workers):
            each.start()
            started.callback(each.kill)
        yield stack


def wait_until_serving(stack: ChaosStack) -> None:
    """Return when every worker is ready and the frontend lists the model."""
    for worker in stack.workers:
        worker.wait_ready()
    workers = sum(worker.name.startswith("PD") for worker in stack.workers)
    wait_until(lambda: pd_workers_seen(stack.url) == workers, 30, "the frontend finds no PD worker")


def _system_ports(count: int) -> list[int]:
    """Return free ports below 32768, which is all that Dynamo reads."""
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 400):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")
