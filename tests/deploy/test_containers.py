"""What every container of deploy/ must have, whoever starts it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import click
import dynamo._core
import pytest

from tests.deploy.containers import (
    COMPOSE,
    COMPOSE_TRTLLM,
    ROLES,
    ROOT,
    Container,
    check_command,
    of_compose,
    of_graph,
)
from trtllm_mm_cache.settings import GB, MB, EncodeSettings, FrontendSettings, ImageLimits, PdSettings

CONTAINERS = [*of_compose(COMPOSE), *of_compose(COMPOSE, COMPOSE_TRTLLM), *of_graph()]
WORKERS = [each for each in CONTAINERS if each.role != "frontend"]

every_container = pytest.mark.parametrize("container", CONTAINERS, ids=lambda each: each.where)
every_worker = pytest.mark.parametrize("container", WORKERS, ids=lambda each: each.where)

OTHERS = re.compile(r"(UCX|HF)_[A-Z_]+")
"""Variables that libraries read; Dynamo's and ours are looked for."""


@pytest.fixture(scope="module")
def readers() -> bytes:
    """Return Dynamo's runtime and our own code, in which the names stand that they read."""
    ours = (path.read_bytes() for path in (ROOT / "trtllm_mm_cache").rglob("*.py"))
    return b"".join((Path(dynamo._core.__file__).read_bytes(), *ours))


@every_container
def test_the_role_takes_the_command(container: Container) -> None:
    assert container.role in ROLES
    check_command(container.command)


def test_a_wrong_command_is_not_taken() -> None:
    for wrong in (
        ["frontend"],
        ["pd", "--model-path=/models/a", "--capacity-gb=1"],
        ["encode", "--engine=torch"],
    ):
        with pytest.raises(click.UsageError):
            check_command(wrong)


@every_container
def test_every_variable_is_read(container: Container, readers: bytes) -> None:
    names = set(container.environment)
    assert not {name for name in names if name.encode() not in readers and not OTHERS.fullmatch(name)}


@every_container
def test_the_secret_is_where_the_variable_says(container: Container) -> None:
    assert container.secrets == {container.environment["MM_CACHE_SECRET_FILE"]}


@every_container
def test_only_what_must_be_is_writable(container: Container) -> None:
    """The rest of the file system is read-only, and an image that a model reads is nobody's to change."""
    assert container.mounts["/models"] is False
    assert {path for path, writable in container.mounts.items() if writable} <= {"/tmp", "/dev/shm"}  # noqa: S108


@every_container
def test_the_image_has_the_engine(container: Container) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    engine = container.flag("engine") or "transformers"  # a frontend runs none: the smaller image will do
    assert container.image.endswith(f"trtllm-mm-cache:{version}-{engine}")


@every_worker
def test_the_engine_configuration_is_in_the_image(container: Container) -> None:
    path = container.flag("extra-engine-args")
    assert path is not None
    inside = Path("/opt/trtllm-mm-cache")
    assert (ROOT / Path(path).relative_to(inside)).is_file(), path
    for dockerfile in (ROOT / "deploy/docker").glob("*.Dockerfile"):
        assert f"COPY configs {inside}/configs" in dockerfile.read_text()


@every_worker
def test_shared_memory_holds_the_arenas_and_counts_in_the_memory_limit(container: Container) -> None:
    capacity = container.flag("multimodal-embedding-cache-capacity-gb")
    assert capacity is not None
    arenas = int(float(capacity) * GB)
    if container.role == "pd":
        arenas += int(PdSettings.model_fields["transfer_arena_mb"].default * MB)
    engine = GB if container.flag("engine") == "trtllm" else 0  # files of its own
    assert arenas + engine <= container.shared_bytes
    assert container.shared_bytes + GB < container.memory_bytes


BASE, PEERS = 768 * MB, 2
"""What a process takes that has served nothing (transformers: 0.6 GB); how many peers of a kind it has."""
LIMITS = ImageLimits()


def most(container: Container) -> int:
    """Return the bytes that docs/operations.md states for the role with its defaults, without an engine."""
    frontend, largest_file = FrontendSettings(model_path=""), LIMITS.max_file_bytes
    if container.role == "frontend":
        return BASE + int(frontend.request_memory_mb * MB)
    settings = {"pd": PdSettings, "encode": EncodeSettings}[container.role](model_path="")
    plane = 8 * largest_file * PEERS
    total = BASE + container.shared_bytes + plane + int(settings.max_waiting_image_mb * MB)
    if isinstance(settings, PdSettings):
        sent = 2 * PEERS * frontend.request_memory_mb / 3
        return total + int((2 * settings.max_incoming_image_mb + sent + settings.media.http_cache_mb) * MB)
    prepared = settings.preprocess_threads * 12 * LIMITS.max_pixels
    return total + int(settings.max_prepared_mb * MB) + prepared


@every_container
def test_the_memory_limit_has_room_for_what_a_process_may_take(container: Container) -> None:
    assert most(container) <= container.memory_bytes


@every_worker
def test_nixl_gets_a_transport_that_it_takes(container: Container) -> None:
    """Where there is a GPU, NIXL refuses tcp alone."""
    assert container.environment["UCX_TLS"] == (
        "tcp,cuda_copy" if container.flag("engine") == "trtllm" else "tcp"
    )


@every_container
def test_there_is_time_to_drain(container: Container) -> None:
    """A frontend's answers may go on for 60 seconds, a PD worker's as long as a frontend waits for them."""
    assert container.grace_s > 60
