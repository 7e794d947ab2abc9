"""What deploy/ runs in containers, read from the compose files and from the graph for Dynamo's operator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtllm_mm_cache.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
GRAPH: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes/graph.yaml").read_text())
COMPOSE, COMPOSE_TRTLLM = DEPLOY / "compose.yaml", DEPLOY / "compose.trtllm.yaml"
ROLES = ("frontend", "encode", "pd")

_UNITS = {"k": 10, "m": 20, "g": 30}


@dataclass(frozen=True)
class Container:
    """One process as a file of deploy/ describes it; sizes in bytes."""

    where: str
    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str | None]
    """None: a value that is known on the cluster alone."""
    mounts: Mapping[str, bool]
    """Path inside, and whether it can be written."""
    secrets: frozenset[str]
    shared_bytes: int
    memory_bytes: int
    grace_s: int

    @property
    def role(self) -> str:
        """The command of trtllm-mm-cache that runs."""
        return self.command[0]

    def flag(self, name: str) -> str | None:
        """Return the value of a flag, written --name=value."""
        values = [each.partition("=")[2] for each in self.command if each.startswith(f"--{name}=")]
        return values[0] if values else None


def composed(*files: Path) -> dict[str, Any]:
    """Return what compose makes of the files: each on top of the one before, by its rules for merging."""
    whole: dict[str, Any] = {}
    for file in files:
        whole = _merge(whole, yaml.safe_load(file.read_text()))
    return whole


def _merge(under: Any, over: Any, name: str = "") -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        both = under.keys() & over.keys()
        return under | over | {each: _merge(under[each], over[each], each) for each in both}
    if isinstance(under, list) and isinstance(over, list) and name not in ("command", "test"):
        return under + over
    return over


def of_compose(*files: Path) -> list[Container]:
    """Return the containers of one compose deployment that run this package."""
    whole = composed(*files)
    where = files[-1].name
    return [_service(where, name, whole["services"][name]) for name in ROLES]


def _service(where: str, name: str, service: Mapping[str, Any]) -> Container:
    volumes = [re.fullmatch(r"(\$\{.*\}|[^:]*):([^:]*)(:ro)?", each) for each in service["volumes"]]
    mounts = {volume[2]: volume[3] is None for volume in volumes if volume}
    return Container(
        where=f"{where}: {name}",
        image=service["image"],
        command=tuple(service["command"]),
        environment=service["environment"],
        mounts=mounts | dict.fromkeys(service["tmpfs"], True),
        secrets=frozenset(f"/run/secrets/{secret}" for secret in service["secrets"]),
        shared_bytes=_bytes(service.get("shm_size", "64m")),
        memory_bytes=_bytes(service["deploy"]["resources"]["limits"]["memory"]),
        grace_s=int(service["stop_grace_period"].removesuffix("s")),
    )


def of_graph() -> list[Container]:
    """Return the main containers of the graph's components."""
    return [_component(each) for each in GRAPH["spec"]["components"]]


def _component(component: Mapping[str, Any]) -> Container:
    pod = component["podTemplate"]["spec"]
    (main,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    secrets = {
        f"{mount['mountPath']}/secret" for mount in main["volumeMounts"] if "secret" in volumes[mount["name"]]
    }
    shared = [
        volumes[mount["name"]]["emptyDir"]
        for mount in main["volumeMounts"]
        if mount["mountPath"] == "/dev/shm"  # noqa: S108 (not a temporary file)
    ]
    assert all(each["medium"] == "Memory" for each in shared)
    return Container(
        where=f"graph.yaml: {component['name']}",
        image=main["image"],
        command=(*main["command"][1:], *main["args"]),
        environment={
            each["name"]: each.get("value") for each in (*GRAPH["spec"]["env"], *main.get("env", []))
        },
        mounts={mount["mountPath"]: not mount.get("readOnly", False) for mount in main["volumeMounts"]},
        secrets=frozenset(secrets),
        shared_bytes=_bytes(shared[0]["sizeLimit"]) if shared else 0,
        memory_bytes=_bytes(main["resources"]["limits"]["memory"]),
        grace_s=pod["terminationGracePeriodSeconds"],
    )


def _bytes(size: str) -> int:
    """Return a size as compose (512m, 4g) and Kubernetes (4Gi) write it."""
    number, unit = re.fullmatch(r"(\d+)([kmg]|[KMG]i)", size).groups()  # type: ignore[union-attr]
    return int(number) << _UNITS[unit[0].lower()]


def check_command(command: Sequence[str]) -> None:
    """Let the command line read a command without running it. Raises `click.UsageError` where it refuses."""
    role, *arguments = command
    cli.commands[role].make_context(role, arguments).close()
