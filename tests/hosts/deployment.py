"""A deployment over two hosts: etcd, frontend and PD worker on one, encode workers on either."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from tests.e2e.stack import message, pd_workers_seen, wait_until
from tests.hosts.network import INTERFACE, Cable, Host, two_hosts
from tests.services import CLI, Service
from tests.transports import over_tcp

DEMO_MODEL = Path(__file__).parents[2] / "models/shapes-qwen2-vl"
LARGEST_SIDE = 560
"""Pixels; the demo model itself makes larger pictures smaller than a READ of theirs could be watched."""
TRANSFER_TIMEOUT_S = 1
ENCODE_TIMEOUT_S = 8
LEASE_TIMEOUT_S = 3 * TRANSFER_TIMEOUT_S

_METRICS_PORT = 9000


@dataclass
class Deployment:
    """What runs where. All but `far_encoder` is on the `near` host, where the clients are too."""

    near: Host
    far: Host
    cable: Cable
    folder: Path
    model: Path
    client: openai.OpenAI
    pd: Service
    far_encoder: Service

    def begin(self, *parts: str | Image.Image, max_tokens: int = 24, **options: Any) -> Future[str]:
        """Ask from the near host, in a thread."""

        def ask() -> str:
            answer = self.client.chat.completions.create(
                model=self.model.name,
                messages=[message(*parts)],
                max_tokens=max_tokens,
                temperature=0,
                **options,
            )
            return answer.choices[0].message.content or ""

        return self.near.begin(ask)

    def ask(self, *parts: str | Image.Image, **options: Any) -> str:
        """Ask from the near host and return the answer."""
        return self.begin(*parts, **options).result()

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric of the PD worker."""
        return self.near.do(lambda: self.pd.process.metric(name, **labels))

    def far_metric(self, name: str, **labels: str) -> float:
        """Return a metric of the encode worker on the far host."""
        return self.far.do(lambda: self.far_encoder.process.metric(name, **labels))

    def encode_worker(self, host: Host, name: str) -> Service:
        """Return a further encode worker, not yet started."""
        return _worker(host, self.model, "encode", name, self.far_encoder.environment, _METRICS_PORT + 2)


@contextmanager
def deployed(folder: Path, *, lease_ttl_s: int = 20) -> Iterator[Deployment]:
    """Bring everything up, and down in the end. `lease_ttl_s` is that of the etcd leases."""
    with ExitStack() as stack:
        near, far, cable = stack.enter_context(two_hosts())
        model = _model(folder)
        secret = folder / "secret"
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        environment = {**_environment(near, lease_ttl_s), "MM_CACHE_SECRET_FILE": str(secret)}
        etcd = _etcd(near, folder)
        pd = _worker(near, model, "pd", "pd", environment, _METRICS_PORT)
        frontend = Service(
            "frontend",
            near.command(*CLI, "frontend", "--model-path", str(model), "--http-host", near.address),
            folder,
            "frontend listens",
            environment,
        )
        encoder = _worker(far, model, "encode", "far-encoder", environment, _METRICS_PORT + 1)
        for service in (etcd, frontend, pd, encoder):
            service.start()
            stack.callback(service.kill)
            if service is etcd:
                etcd.wait_ready()
        pd.wait_ready()
        encoder.wait_ready()
        client = openai.OpenAI(
            base_url=f"http://{near.address}:8000/v1",
            api_key="none",
            timeout=60,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )
        stack.callback(client.close)
        wait_until(
            lambda: near.do(lambda: pd_workers_seen(str(client.base_url))) == 1,
            30,
            "the frontend finds no PD worker",
        )
        deployment = Deployment(near, far, cable, folder, model, client, pd, encoder)
        wait_until(
            lambda: deployment.metric("trtllm_mm_cache_encode_workers") == 1,
            30,
            "the PD worker sees no encoder",
        )
        yield deployment


def _etcd(host: Host, folder: Path) -> Service:
    client, peer = f"http://{host.address}:2379", "http://127.0.0.1:2380"
    command = host.command(
        *("etcd", "--data-dir", str(folder / "etcd"), "--logger", "zap", "--log-outputs", "stderr"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}"),
    )
    return Service("etcd", command, folder, "serving client traffic")


def _environment(near: Host, lease_ttl_s: int) -> dict[str, str]:
    return {
        "DYN_DISCOVERY_BACKEND": "etcd",
        "ETCD_ENDPOINTS": f"http://{near.address}:2379",
        "ETCD_LEASE_TTL": str(lease_ttl_s),
        "DYN_TCP_REQUEST_TIMEOUT": "2",  # how long Dynamo waits for a worker to take a request; its own is 5
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
        "UCX_TLS": over_tcp(),
        "UCX_TCP_SNDBUF": "32k",
        "UCX_NET_DEVICES": INTERFACE,
    }


def _model(folder: Path) -> Path:
    """Return a copy of the demo model that takes large pictures as they are; cards it sees as ever."""
    model = folder / DEMO_MODEL.name
    shutil.copytree(DEMO_MODEL, model)
    config = model / "preprocessor_config.json"
    settings = json.loads(config.read_text())
    settings["size"]["longest_edge"] = LARGEST_SIDE**2
    config.write_text(json.dumps(settings))
    return model


def _worker(
    host: Host, model: Path, role: str, name: str, environment: Mapping[str, str], port: int
) -> Service:
    options = ["--model-path", str(model), "--transfer-timeout-s", str(TRANSFER_TIMEOUT_S)]
    cache = "--multimodal-embedding-cache-capacity-gb"
    if role == "pd":
        options += [cache, "0.03125", "--encode-timeout-s", str(ENCODE_TIMEOUT_S)]
        options += ["--transfer-arena-mb", "8", "--transfer", "nixl"]  # it is one machine
    else:
        options += [cache, "0.03125"]
    ready = "PD worker ready" if role == "pd" else "encode worker ready"
    return Service(name, host.command(*CLI, role, *options), model.parent, ready, environment, port)
