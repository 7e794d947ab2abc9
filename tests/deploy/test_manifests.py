"""The example manifests are valid for Kubernetes' own schemas, and name nothing that is not there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import dynamo._core
import pytest
import yaml

from tests.docs.flags import unknown_flags

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import kubernetes_validate

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("frontend", "pd", "encode")

Manifest = dict[str, Any]
MANIFESTS: list[Manifest] = [
    each
    for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
]

RELEASES = ("1.30", "1.37")
"""The oldest release with the `sleep` of a preStop hook on by default, and the newest."""

OURS_TO_SET = re.compile(r"(UCX|HF)_[A-Z_]+|MM_CACHE_SECRET_FILE")


def manifest(kind: str, name: str) -> Manifest:
    return next(each for each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pod_template(role: str) -> Manifest:
    template: Manifest = manifest("Deployment", f"mm-cache-{role}")["spec"]["template"]
    return template


def container(role: str) -> Manifest:
    (only,) = pod_template(role)["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("each", MANIFESTS, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_every_object_fits_the_schema(each: Manifest, release: str) -> None:
    kubernetes_validate.validate(each, release, strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_the_role_has_the_flags(role: str) -> None:
    assert container(role)["command"] == ["trtllm-mm-cache", role]
    assert not unknown_flags(role, container(role).get("args", []))


@pytest.fixture(scope="module")
def library() -> bytes:
    """Return Dynamo's runtime, in which the names stand that it reads from the environment."""
    return Path(dynamo._core.__file__).read_bytes()


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_read(role: str, library: bytes) -> None:
    names = {each["name"] for each in container(role)["env"]}
    unread = {name for name in names if name.encode() not in library and not OURS_TO_SET.fullmatch(name)}
    assert not unread
    assert names >= {"DYN_DISCOVERY_BACKEND", "POD_NAME", "POD_NAMESPACE", "POD_UID"}


@pytest.mark.parametrize("role", ROLES)
def test_what_belongs_together_agrees(role: str) -> None:
    """Labels and selectors, named ports, mounted volumes, the account that may discover."""
    template, spec = pod_template(role), manifest("Deployment", f"mm-cache-{role}")["spec"]
    labels = template["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service", f"mm-cache-{role}")["spec"]["selector"].items() <= labels.items()
    assert (
        template["spec"]["serviceAccountName"] == manifest("ServiceAccount", "mm-cache")["metadata"]["name"]
    )
    ports = {port["name"] for port in container(role)["ports"]}
    probes = [probe for name, probe in container(role).items() if name.endswith("Probe")]
    assert {probe["httpGet"]["port"] for probe in probes} <= ports
    mounted = {mount["name"] for mount in container(role)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize("role", ["pd", "encode"])
def test_shared_memory_holds_the_arena_and_counts_in_the_memory_limit(role: str) -> None:
    flag = "--multimodal-embedding-cache-capacity-gb="
    (capacity,) = (
        float(each.removeprefix(flag)) for each in container(role)["args"] if each.startswith(flag)
    )
    (shm,) = (volume for volume in pod_template(role)["spec"]["volumes"] if volume["name"] == "shm")
    shared, limit = _gib(shm["emptyDir"]["sizeLimit"]), _gib(container(role)["resources"]["limits"]["memory"])
    assert capacity + 1 <= shared < limit


def _gib(quantity: str) -> float:
    assert quantity.endswith("Gi"), quantity
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("role", ["pd", "encode"])
def test_the_engine_configuration_is_in_the_repository(role: str) -> None:
    flag = "--extra-engine-args=/opt/trtllm-mm-cache/"
    (path,) = (each.removeprefix(flag) for each in container(role)["args"] if each.startswith(flag))
    assert (ROOT / path).is_file(), path
