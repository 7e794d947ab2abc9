"""Frontend, PD worker and two peers of the encode worker, each a process that a test may kill and restart."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

from tests.e2e.cards import MAX_TOKENS, Asked
from tests.e2e.stack import REPOSITORY, free_port, message, pd_workers_seen, wait_until
from tests.services import CLI, WITH_US, Service
from tests.transports import over_tcp

TRANSFER_TIMEOUT_S = 2
LEASE_TIMEOUT_S = 3 * TRANSFER_TIMEOUT_S  # of the encode workers
ENCODE_TIMEOUT_S = 5
MAX_REQUESTS = 12
CACHE_GB = "0.03125"


@dataclass
class Deployment:
    """The processes, and what is asked of them. `peers` are encode workers whose faults a test sets."""

    folder: Path
    model: Path
    client: openai.OpenAI
    frontend: Service
    pd: Service
    peers: list[Service]

    def fault(self, *words: str, peers: list[Service] | None = None) -> None:
        """Have the given peers (all, if none are given) answer their next calls that way."""
        for peer in peers or self.peers:
            file = self.folder / f"{peer.name}.fault"
            (new := file.with_suffix(".new")).write_text(" ".join(words))
            new.replace(file)

    def calls(self, peer: Service) -> int:
        """Return how often a peer has been called since its start."""
        return peer.log.read_text(errors="replace").count("called: ")

    def ask(self, asked: Asked, client: openai.OpenAI | None = None) -> str:
        """Ask and return the answer."""
        answer = (client or self.client).chat.completions.create(
            model=self.model.name, messages=[message(*asked.parts)], max_tokens=MAX_TOKENS, temperature=0
        )
        return answer.choices[0].message.content or ""

    def say(self, text: str, **options: object) -> str:
        """Ask without a picture."""
        options = {"max_tokens": 2, "temperature": 0} | options
        answer = self.client.chat.completions.create(  # type: ignore[call-overload]
            model=self.model.name, messages=[message(text)], **options
        )
        return str(answer.choices[0].message.content or "")

    def pd_metric(self, name: str, **labels: str) -> float:
        """Return a metric of the PD worker."""
        return self.pd.process.metric(name, **labels)

    def exports(self, outcome: str) -> float:
        """Return how many exports of the live peers ended that way."""
        return sum(
            peer.process.metric("trtllm_mm_cache_exports_total", outcome=outcome)
            for peer in self.peers
            if peer.alive
        )

    def nothing_held(self, timeout_s: float = LEASE_TIMEOUT_S + 5) -> None:
        """Wait until neither side holds anything of a request."""

        def held() -> dict[str, float]:
            names = ("leased_bytes", "reservations", "withdrawn_bytes", "quarantined_bytes")
            found = {name: self.pd_metric(f"trtllm_mm_cache_{name}") for name in names}
            found["flights"] = self.pd_metric("trtllm_mm_cache_flights_in_progress")
            for peer in self.peers:
                if peer.alive:
                    metric = peer.process.metric
                    found[f"exports of {peer.name}"] = metric("trtllm_mm_cache_exports_held")
                    found[f"leases of {peer.name}"] = metric("trtllm_mm_cache_leased_bytes")
            return {name: count for name, count in found.items() if count}

        wait_until(lambda: not held(), timeout_s, f"still held: {held()}")


@contextmanager
def deployed(folder: Path, model: Path, *pd_options: str) -> Iterator[Deployment]:
    """Start everything, and end it however the test ends. Over TCP, where a frozen peer delays a READ."""
    port = free_port()
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_LOG": "error",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "UCX_TLS": over_tcp(),
        "PYTHONPATH": str(REPOSITORY),
    }
    ports = _system_ports(3)
    args = REPOSITORY / "configs/cpu-demo"
    pd_command = [*CLI, "pd", "--model-path", str(model), "--extra-engine-args", str(args / "pd.yaml")]
    pd = Service(
        "pd",
        [
            *WITH_US,
            *pd_command,
            *("--multimodal-embedding-cache-capacity-gb", CACHE_GB),
            *("--encode-timeout-s", str(ENCODE_TIMEOUT_S), "--transfer-timeout-s", "2"),
            *("--transfer", "nixl"),
            *("--max-concurrent-requests", str(MAX_REQUESTS), "--max-waiting-image-mb", "1"),
            *pd_options,
        ],
        folder,
        "PD worker ready",
        environment,
        ports[0],
    )
    peers = []
    for number in (1, 2):
        name = f"peer-{number}"
        (folder / f"{name}.fault").write_text("good")
        command = [CLI[0], "-m", "tests.faults.encode_peer", str(folder / f"{name}.fault")]
        options = ["--model-path", str(model), "--extra-engine-args", str(args / "encode.yaml")]
        options += ["--multimodal-embedding-cache-capacity-gb", CACHE_GB]
        options += ["--transfer-timeout-s", str(TRANSFER_TIMEOUT_S)]
        peers.append(
            Service(
                name,
                [*WITH_US, *command, *options],
                folder,
                "encode worker ready",
                environment,
                ports[number],
            )
        )
    frontend = Service(
        "frontend",
        [*WITH_US, *CLI, "frontend", "--model-path", str(model), "--http-port", str(port)],
        folder,
        "listens",
        environment,
    )
    with ExitStack() as stack:
        for service in (frontend, pd, *peers):
            service.start()
            stack.callback(service.kill)
        for service in (frontend, pd, *peers):
            service.wait_ready()
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0
        )
        stack.callback(client.close)
        deployment = Deployment(folder, model, client, frontend, pd, peers)
        wait_until(lambda: pd_workers_seen(str(client.base_url)) == 1, 30, "the frontend finds no PD worker")
        yield deployment


def _system_ports(count: int) -> list[int]:
    """Return free ports below 32768: Dynamo reads them as signed 16-bit numbers."""
    free: list[int] = []
    while len(free) < count:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(20000, 32768)))
            except OSError:
                continue
            free.append(probe.getsockname()[1])
    return free
