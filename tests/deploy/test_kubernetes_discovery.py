"""The manifests' processes find each other by Dynamo's Kubernetes discovery.

The processes, what they ask the API server for and the rules of the Role are real. The API server, the pods'
addresses and the kubelet are played here: a pod is ready, and in the EndpointSlice of its Service, when its
readiness probe succeeds.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.deploy.kubernetes_api import KubernetesApi, kubernetes_api
from tests.deploy.manifests import ROLES, container, manifest, pod_template
from tests.e2e.stack import REPOSITORY, message, new_picture, wait_until
from tests.services import CLI, WITH_US, Service

NAMESPACE = "serving"
DEMO_MODEL = REPOSITORY / "models/shapes-qwen2-vl"
READY = {"frontend": "frontend listens", "pd": "PD worker ready", "encode": "encode worker ready"}


@dataclass(frozen=True)
class Pod:
    """One pod of a role, as a process."""

    role: str
    service: Service
    ports: dict[str, int]

    @property
    def name(self) -> str:
        return f"mm-cache-{self.role}-7c9f-x2x4z"

    def is_ready(self) -> bool:
        """Do what the kubelet does: the readiness probe."""
        probe = container(self.role)["readinessProbe"]["httpGet"]
        try:
            url = f"http://127.0.0.1:{self.ports[probe['port']]}{probe['path']}"
            with urllib.request.urlopen(url, timeout=5):
                return self.service.alive
        except (urllib.error.URLError, ConnectionError):
            return False


@dataclass(frozen=True)
class Cluster:
    """The API server, the pods, and a client of the frontend."""

    api: KubernetesApi
    pods: dict[str, Pod]
    client: openai.OpenAI

    def reconcile(self) -> None:
        """Do what the kubelet and the EndpointSlice controller do, once."""
        for role, pod in self.pods.items():
            service = manifest("Service", f"mm-cache-{role}")
            chosen = service["spec"]["selector"].items() <= pod_template(role)["metadata"]["labels"].items()
            endpoint = {
                "addresses": ["127.0.0.1"],
                "conditions": {"ready": pod.is_ready()},
                "targetRef": {"kind": "Pod", "name": pod.name, "uid": f"uid-of-{pod.name}"},
            }
            metadata = {"name": f"{service['metadata']['name']}-slice", "namespace": NAMESPACE}
            metadata["labels"] = service["metadata"].get("labels", {})
            slice_ = {"addressType": "IPv4", "metadata": metadata, "endpoints": [endpoint] if chosen else []}
            before, _ = self.api.listing("endpointslices", {})
            if not any(_same(each, slice_) for each in before):
                self.api.put("endpointslices", slice_)

    def ask(self, picture: Any) -> str:
        """Ask the frontend about a picture."""
        answer = self.client.chat.completions.create(
            model=DEMO_MODEL.name, messages=[message(picture, "What is this?")], max_tokens=2
        )
        return answer.choices[0].message.content or ""

    def encode_workers(self) -> float:
        """Return how many encode workers the PD worker sees."""
        return self.pods["pd"].service.process.metric("trtllm_mm_cache_encode_workers")

    def kill_the_encode_worker(self) -> None:
        """Kill its container, if it runs, and return when the PD worker knows that the pod is not ready."""
        if self.pods["encode"].service.alive:
            self.pods["encode"].service.kill()
        self.reconcile()
        wait_until(lambda: self.encode_workers() == 0, 10, "it is still listed")

    def lists_the_model(self) -> bool:
        self.reconcile()
        try:
            return [model.id for model in self.client.models.list().data] == [DEMO_MODEL.name]
        except openai.APIConnectionError:
            return False


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["metadata"]["name"] == other["metadata"]["name"] and one["endpoints"] == other["endpoints"]
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        api = stack.enter_context(kubernetes_api(manifest("Role", "mm-cache-discovery")["rules"]))
        config = folder / "kubeconfig"
        config.write_text(yaml.safe_dump(_kubeconfig(api.address)))
        pods = {role: _pod(role, folder, config) for role in ROLES}
        for pod in pods.values():
            pod.service.start()
            stack.callback(pod.service.kill)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{pods['frontend'].ports['http']}/v1",
            api_key="none",
            timeout=60,
            max_retries=0,
        )
        stack.callback(client.close)
        running = Cluster(api, pods, client)
        for pod in pods.values():
            pod.service.wait_ready()
        wait_until(running.lists_the_model, 30, "the frontend lists no model")
        wait_until(lambda: running.encode_workers() == 1, 30, "the PD worker sees no encode worker")
        yield running


def _kubeconfig(address: str) -> dict[str, Any]:
    context = {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}
    return {
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [context],
        "current-context": "test",
    }


def _pod(role: str, folder: Path, kubeconfig: Path) -> Pod:
    """Make the container's process as the manifest has it, but for engine, model, sizes and addresses."""
    ports = {port["name"]: _free_port() for port in container(role)["ports"]}
    pod = Pod(role, Service(role, (), folder, READY[role]), ports)
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": NAMESPACE,
        "metadata.uid": f"uid-of-{pod.name}",
        "status.podIP": "127.0.0.1",
    }
    environment = {
        each["name"]: each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container(role)["env"]
    }
    environment |= {"KUBECONFIG": str(kubeconfig), "UCX_NET_DEVICES": "lo", "DYN_SYSTEM_HOST": "127.0.0.1"}
    if role == "frontend":
        arguments = ["--http-host", "127.0.0.1", "--http-port", str(ports["http"])]
    else:
        environment["DYN_SYSTEM_PORT"] = str(ports["system"])
        arguments = ["--model-path", str(DEMO_MODEL), "--multimodal-embedding-cache-capacity-gb", "0.03125"]
    command = (*WITH_US, *CLI, *container(role)["command"][1:], *arguments)
    service = Service(role, command, folder, READY[role], environment, ports.get("system", 0))
    return Pod(role, service, ports)


def _free_port() -> int:
    """Return a free port that Dynamo can read as its system port: below 32768."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def test_a_picture_is_served_and_hit_and_the_role_allows_what_dynamo_asks_for(cluster: Cluster) -> None:
    picture = new_picture()
    pd = cluster.pods["pd"].service.process
    assert cluster.ask(picture) == cluster.ask(picture)
    assert pd.metric("dynamo_component_embedding_cache_misses_total") == 1
    assert pd.metric("dynamo_component_embedding_cache_hits_total") == 1
    assert cluster.api.refused == []
    assert cluster.api.names("dynamoworkermetadatas") >= {
        cluster.pods[role].name for role in ("pd", "encode")
    }


def test_top_and_drop_run_inside_a_pod(cluster: Cluster) -> None:
    pod = cluster.pods["pd"].service
    for arguments, shows in ((("top",), "PD workers 1, encode workers 1"), (("drop", "--all"), "PD worker ")):
        done = subprocess.run(
            [*CLI, *arguments],
            env={**os.environ, **pod.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert shows in done.stdout


def test_a_pod_whose_container_was_killed_is_not_asked(cluster: Cluster) -> None:
    known = new_picture()
    answer = cluster.ask(known)
    cluster.kill_the_encode_worker()
    assert cluster.ask(known) == answer
    with pytest.raises(openai.InternalServerError) as failed:
        cluster.ask(new_picture())
    assert failed.value.status_code == 503
    for role in ("pd", "encode"):
        assert "discovery has lost this worker" not in cluster.pods[role].service.log.read_text()


@pytest.mark.long
def test_a_container_that_restarts_in_its_pod_is_asked_again(cluster: Cluster) -> None:
    cluster.kill_the_encode_worker()
    encode = cluster.pods["encode"].service
    encode.start()
    encode.wait_ready()
    cluster.reconcile()
    wait_until(lambda: cluster.encode_workers() == 1, 10, "it is not listed again")
    cluster.ask(new_picture())
    assert encode.process.metric("trtllm_mm_cache_encodes_total") == 1
