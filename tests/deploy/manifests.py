"""The example manifests of deploy/kubernetes/, as objects."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy/kubernetes"
ROLES = ("frontend", "pd", "encode")

Manifest = dict[str, Any]


@cache
def manifests() -> list[tuple[str, Manifest]]:
    """Return every object, with a name for people."""
    return [
        (f"{path.name}: {each['kind']} {each['metadata']['name']}", each)
        for path in sorted(FOLDER.glob("*.yaml"))
        for each in yaml.safe_load_all(path.read_text())
    ]


def manifest(kind: str, name: str) -> Manifest:
    """Return one object."""
    return next(each for _, each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pod_template(role: str) -> Manifest:
    """Return what the pods of a role are made from."""
    template: Manifest = manifest("Deployment", f"mm-cache-{role}")["spec"]["template"]
    return template


def container(role: str) -> Manifest:
    """Return the one container of a role's pods."""
    (only,) = pod_template(role)["spec"]["containers"]
    return dict(only)
