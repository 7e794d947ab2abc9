"""The services of deploy/compose.yaml, with its commands and variables, as processes of this machine.

What only a container engine does is not in it: images, networks, file systems. Names of the compose
network are put on loopback, and what the file says of memory is held by the other tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from PIL import Image

from tests.deploy.containers import COMPOSE, DEPLOY, ROOT, composed, of_compose
from tests.e2e.stack import free_port, message, pd_workers_seen, wait_until
from tests.services import CLI, Service

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None, reason="needs etcd (Debian's package etcd-server)"
)


class Composed:
    """The services that run, and the port of the frontend."""

    def __init__(self, folder: Path, system_port: Callable[[], int]) -> None:
        self._folder = folder
        self._new_port = system_port
        self._secret = folder / "mm-cache.secret"
        self._secret.write_text("0123456789abcdef" * 4)
        self._secret.chmod(0o600)
        self._etcd_port = free_port()
        self.http_port = free_port()
        self.services: dict[str, Service] = {"etcd": self._etcd()}
        for container in of_compose(COMPOSE):
            here = self._here(container.environment)
            port = system_port() if container.role != "frontend" else 0
            # The rest is each service's own, as the file has it.
            here |= {"DYN_SYSTEM_PORT": str(port)} if port else {"DYN_HTTP_PORT": str(self.http_port)}
            command = [*CLI, *map(self._path, container.command)]
            self.services[container.role] = Service(container.role, command, folder, "", here, port)

    def _etcd(self) -> Service:
        command: list[str] = composed(COMPOSE)["services"]["etcd"]["command"]
        here = {
            "0.0.0.0:2379": f"127.0.0.1:{self._etcd_port}",
            "etcd:2379": f"127.0.0.1:{self._etcd_port}",
            "/etcd-data": str(self._folder / "etcd"),
        }
        peer = f"http://127.0.0.1:{free_port()}"
        for there, name in here.items():
            command = [command[0], *(each.replace(there, name) for each in command[1:])]
        peers = ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        peers += ["--initial-cluster", f"default={peer}"]
        return Service("etcd", [*command, *peers], self._folder, "")

    def _here(self, environment: object) -> dict[str, str]:
        assert isinstance(environment, dict)
        return environment | {
            "ETCD_ENDPOINTS": environment["ETCD_ENDPOINTS"].replace(
                "etcd:2379", f"127.0.0.1:{self._etcd_port}"
            ),
            "MM_CACHE_SECRET_FILE": str(self._secret),
            "UCX_NET_DEVICES": "lo",
            "DYN_HTTP_HOST": "127.0.0.1",
        }

    def _path(self, argument: str) -> str:
        return argument.replace("/models/", f"{ROOT}/models/").replace("/opt/trtllm-mm-cache/", f"{ROOT}/")

    def healthy(self, name: str) -> bool:
        """Whether the image's own check says so; fails when the process has ended."""
        service = self.services[name]
        assert service.alive, f"{name} ended:\n" + service.log.read_text()
        environment = {**os.environ, **service.environment}
        if name == "etcd":  # what etcdctl would ask; it is another package
            environment["DYN_SYSTEM_PORT"] = str(self._etcd_port)
        check = [sys.executable, str(DEPLOY / "docker/healthcheck.py")]
        return (
            subprocess.run(check, env=environment, capture_output=True, check=False, timeout=30).returncode
            == 0
        )


@pytest.fixture
def running(tmp_path: Path, system_port: Callable[[], int]) -> Iterator[Composed]:
    whole = Composed(tmp_path, system_port)
    with ExitStack() as stack:
        for name, service in whole.services.items():
            service.start()
            stack.callback(lambda service=service: service.kill() if service.alive else None)
            if name == "etcd":  # depends_on
                wait_until(lambda: whole.healthy("etcd"), 30, "etcd was not healthy")
        for name in whole.services:
            wait_until(lambda name=name: whole.healthy(name), 90, f"{name} was not healthy")
        yield whole


def test_the_services_serve_an_image_and_drain(running: Composed) -> None:
    url = f"http://127.0.0.1:{running.http_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with Image.open(ROOT / "models/card.png") as card:
        asked = message(card, "Where is the yellow cross?")

    def answer() -> str:
        chat = client.chat.completions.create(
            model="shapes-qwen2-vl", messages=[asked], max_tokens=16, temperature=0
        )
        return chat.choices[0].message.content or ""

    with client:
        wait_until(lambda: pd_workers_seen(url) == 1, 30, "the frontend finds no PD worker")
        assert [answer(), answer()] == ["top right", "top right"]
    pd = running.services["pd"].process
    assert pd.metric("dynamo_component_embedding_cache_hits_total") == 1
    for name in ("frontend", "pd", "encode"):
        assert running.services[name].stop() == 0
