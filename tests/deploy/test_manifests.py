"""The example manifests are valid for Kubernetes' own schemas, and name nothing that is not there.

That their processes find each other is held in test_kubernetes_discovery.py.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import click
import dynamo._core
import pytest

from tests.deploy.manifests import FOLDER, ROLES, Manifest, container, manifest, manifests, pod_template
from trtllm_mm_cache.cli.main import cli

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import kubernetes_validate

RELEASES = ("1.30", "1.37")
"""The oldest release with the `sleep` of a preStop hook on by default, and the newest."""

OURS_TO_SET = re.compile(r"(UCX|HF)_[A-Z_]+")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("each", [each for _, each in manifests()], ids=[name for name, _ in manifests()])
def test_every_object_fits_the_schema(each: Manifest, release: str) -> None:
    kubernetes_validate.validate(each, release, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    wrong: dict[str, Any] = {**manifest("Service", "mm-cache-pd")}
    wrong["spec"] = {**wrong["spec"], "selektor": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selektor"):
        kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


@pytest.mark.parametrize("role", ROLES)
def test_the_command_line_takes_the_arguments(role: str) -> None:
    words: list[str] = [*container(role)["command"], *container(role).get("args", [])]
    program, *arguments = words
    assert program == "trtllm-mm-cache"
    with click.Context(cli) as context:
        name, command, rest = cli.resolve_command(context, list(arguments))
        assert (name, command is not None) == (role, True)
        assert command
        assert command.make_context(name, rest, parent=context).args == []


@pytest.fixture(scope="module")
def library() -> bytes:
    """Return Dynamo's runtime, in which the names stand that it reads from the environment."""
    return Path(dynamo._core.__file__).read_bytes()


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_read_by_somebody(role: str, library: bytes) -> None:
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
    assert (FOLDER.parents[1] / path).is_file(), path
