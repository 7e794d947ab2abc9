"""The DynamoGraphDeployment fits Dynamo's CRD, its pods Kubernetes, and the operator leaves them whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.containers import DEPLOY, GRAPH, ROLES, ROOT
from tests.e2e.stack import wait_until
from tests.services import CLI, Service

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import kubernetes_validate

Json = dict[str, Any]

SCHEMA: Json = json.loads((Path(__file__).parent / "schemas/dynamographdeployment.json").read_text())
COMPONENTS: dict[str, Json] = {each["name"]: each for each in GRAPH["spec"]["components"]}
POLICIES: list[Json] = [*yaml.safe_load_all((DEPLOY / "kubernetes/network-policy.yaml").read_text())]

RELEASES = ("1.30", "1.37")
"""The oldest release with the `sleep` of a preStop hook on by default, and the newest."""

OPERATOR = {
    "DYN_COMPONENT": "worker",
    "DYN_DISCOVERY_BACKEND": "kubernetes",
    "DYN_FORWARDPASS_METRIC_PORT": "20380",
    "DYN_HEALTH_CHECK_ENABLED": "false",
    "DYN_NAMESPACE": "serving-mm-cache",
    "DYN_NAMESPACE_WORKER_SUFFIX": "3f786850",
    "DYN_PARENT_DGD_K8S_NAME": "mm-cache",
    "DYN_PARENT_DGD_K8S_NAMESPACE": "serving",
    "DYN_SYSTEM_ENABLED": "true",
    "DYN_SYSTEM_PORT": "9090",
    "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]',
    "NIXL_TELEMETRY_ENABLE": "n",
    "NIXL_TELEMETRY_EXPORTER": "prometheus",
    "NIXL_TELEMETRY_PROMETHEUS_PORT": "19090",
}
"""What Dynamo's operator sets for a worker (its deploy/operator/internal/dynamo/component_worker.go)."""
OPERATOR_PORTS = {"frontend": {"http"}, "worker": {"system", "nixl"}}


def strict(schema: Any) -> Any:
    """Return the schema as an API server takes it from kubectl: a field that it does not name is an error."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


# Kubernetes' own fields, of which a CRD says no more than that it is an object.
METADATA: Json = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
VALIDATOR = jsonschema.Draft7Validator(
    strict(SCHEMA | {"properties": SCHEMA["properties"] | {"metadata": METADATA}})
)


def template(name: str) -> Json:
    pod: Json = COMPONENTS[name]["podTemplate"]
    return pod


def main(name: str) -> Json:
    (only,) = template(name)["spec"]["containers"]
    return dict(only)


def variables(name: str) -> dict[str, str]:
    given = {each["name"]: each["value"] for each in GRAPH["spec"]["env"] if "value" in each}
    return given | {each["name"]: each["value"] for each in main(name).get("env", [])}


def test_the_graph_fits_dynamos_crd() -> None:
    assert (GRAPH["apiVersion"], GRAPH["kind"]) == ("nvidia.com/v1beta1", "DynamoGraphDeployment")
    VALIDATOR.validate(GRAPH)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(backendFramework="transformers"),
        lambda spec: spec.update(services=[]),
        lambda spec: spec["components"][1].update(type="encode"),
        lambda spec: spec["components"][1].update(replicas="2"),
        lambda spec: spec["components"][1].update(sharedMemory={"size": "4Gi"}),
        lambda spec: spec["components"][1].update(runtimeVersionOverride="1.6"),
        lambda spec: spec["components"][1]["podTemplate"]["spec"]["containers"][0].update(arguments=[]),
    ],
)
def test_the_crd_refuses_what_is_wrong(spoil: Callable[[Json], None]) -> None:
    wrong = deepcopy(GRAPH)
    spoil(wrong["spec"])
    assert not VALIDATOR.is_valid(wrong)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_pod_fits_kubernetes(name: str, release: str) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template(name)}
    kubernetes_validate.validate(pod, release, strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda each: each["metadata"]["name"])
def test_every_policy_fits_kubernetes(policy: Json, release: str) -> None:
    kubernetes_validate.validate(policy, release, strict=True)


def test_the_operator_finds_what_it_needs() -> None:
    """Container `main`, Dynamo's version where no tag tells it, one type a component."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = (each.partition("==")[2] for each in dependencies if each.startswith("ai-dynamo-runtime=="))
    assert tuple(COMPONENTS) == ROLES
    for name, component in COMPONENTS.items():
        assert component["runtimeVersionOverride"] == version
        assert component["type"] == ("frontend" if name == "frontend" else "worker")
        assert main(name)["name"] == "main"
        assert main(name)["command"] == ["trtllm-mm-cache", name]


def test_the_operator_leaves_dev_shm_alone() -> None:
    """Without a size of "0" it replaces what is mounted there by a volume of 8Gi."""
    for component in COMPONENTS.values():
        assert component["sharedMemorySize"] == "0"


@pytest.mark.parametrize("name", COMPONENTS)
def test_ports_volumes_and_labels_agree(name: str) -> None:
    ports = OPERATOR_PORTS[COMPONENTS[name]["type"]]
    probes = {kind: probe for kind, probe in main(name).items() if kind.endswith("Probe")}
    assert {probe["httpGet"]["port"] for probe in probes.values()} <= ports
    assert {"readinessProbe", "livenessProbe"} <= probes.keys()
    mounted = {mount["name"] for mount in main(name)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template(name)["spec"]["volumes"]}
    (everyone, clients) = POLICIES
    labels = template(name)["metadata"]["labels"]
    assert everyone["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    is_reached = clients["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert is_reached == (name == "frontend")


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_process_is_root(name: str) -> None:
    user = template(name)["spec"]["securityContext"]
    assert user["runAsNonRoot"] is True
    assert (
        f"USER {user['runAsUser']}:{user['runAsGroup']}"
        in (DEPLOY / "docker/transformers.Dockerfile").read_text()
    )
    assert user["fsGroup"] == user["runAsGroup"], "the secret is readable for the group alone"
    confined = main(name)["securityContext"]
    assert confined["readOnlyRootFilesystem"] is True
    assert confined["allowPrivilegeEscalation"] is False
    assert confined["capabilities"] == {"drop": ["ALL"]}


@pytest.fixture
def encode_worker(tmp_path: Path, system_port: Callable[[], int]) -> Iterator[Service]:
    """A real one, with the operator's environment; discovery, secret and transport are this machine's."""
    ours = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(tmp_path / "discovery")}
    cluster = ("MM_CACHE_SECRET_FILE", "UCX_NET_DEVICES", "UCX_TLS")
    given = {name: value for name, value in variables("encode").items() if name not in cluster}
    (tmp_path / "discovery").mkdir(mode=0o700)
    command = [*CLI, "encode", "--model-path", str(ROOT / "models/shapes-qwen2-vl")]
    command += ["--multimodal-embedding-cache-capacity-gb", "0.01"]
    port = system_port()
    environment = OPERATOR | given | ours | {"DYN_SYSTEM_PORT": str(port)}
    service = Service("encode", command, tmp_path, "encode worker ready", environment, port)
    service.start()
    yield service
    if service.alive:
        service.kill()


def test_an_encode_worker_becomes_healthy_under_the_operator(encode_worker: Service) -> None:
    """Dynamo's own server on that port would wait for the endpoint `generate`, which this worker has not."""
    encode_worker.wait_ready()

    def healthy() -> bool:
        environment = {**os.environ, **encode_worker.environment}
        check = [sys.executable, str(DEPLOY / "docker/healthcheck.py")]
        return (
            subprocess.run(check, env=environment, capture_output=True, check=False, timeout=20).returncode
            == 0
        )

    wait_until(healthy, 20, "the encode worker was not healthy")
    assert encode_worker.stop() == 0
    assert not healthy()
