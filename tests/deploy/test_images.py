"""The Dockerfiles: hadolint agrees, what they copy is there, and the health check tells the truth."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.containers import DEPLOY, ROOT

DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

every_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda each: each.name)


def instructions(dockerfile: Path, name: str) -> list[str]:
    """Return the arguments of every instruction of that name, each on one line."""
    joined = dockerfile.read_text().replace("\\\n", " ")
    return [line.removeprefix(f"{name} ") for line in joined.splitlines() if line.startswith(f"{name} ")]


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    command = ["hadolint", "--failure-threshold", "style", str(dockerfile)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@every_image
def test_hadolint_agrees(dockerfile: Path) -> None:
    done = hadolint(dockerfile)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_not_agree_with_everything(tmp_path: Path) -> None:
    poor = tmp_path / "poor.Dockerfile"
    poor.write_text("FROM debian:latest\nRUN cd / && sudo ls\n")
    assert {"DL3007", "DL3004"} <= set(re.findall(r"DL\d+", hadolint(poor).stdout))


@every_image
def test_every_base_has_a_version(dockerfile: Path) -> None:
    defaults = [each.partition("=")[2] for each in instructions(dockerfile, "ARG") if ":" in each]
    bases = [each for each in defaults if "/" in each and "://" not in each]
    assert bases
    for base in bases:
        assert re.search(r":\d+\.\d+\.\d+[a-z0-9.-]*$", base), base
    for start in instructions(dockerfile, "FROM"):
        assert re.match(r"\$\{\w+\}|dependencies", start), (
            "from outside by an ARG alone: a digest can be put in"
        )


def test_the_engine_is_the_one_that_is_required() -> None:
    (wanted,) = PROJECT["optional-dependencies"]["trtllm"]
    (base,) = (each for each in instructions(DEPLOY / "docker/trtllm.Dockerfile", "ARG") if "nvcr.io" in each)
    assert wanted.replace("tensorrt-llm==", "release:") in base


@every_image
def test_it_does_not_run_as_root(dockerfile: Path) -> None:
    assert instructions(dockerfile, "USER")[-1] == "10001:10001"


@every_image
def test_what_it_copies_is_there_and_gets_through_dockerignore(dockerfile: Path) -> None:
    shown = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copied in instructions(dockerfile, "COPY"):
        if copied.startswith("--from="):
            continue
        for source in shlex.split(copied)[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, pattern) for pattern in shown), source


def test_the_layer_of_dependencies_has_all_of_them() -> None:
    """The very command of the Dockerfile, run here."""
    (line,) = (
        each for each in instructions(DEPLOY / "docker/transformers.Dockerfile", "RUN") if "tomllib" in each
    )
    command = line.partition(" > ")[0]
    done = subprocess.run(
        shlex.split(command.replace("python ", f"{sys.executable} ", 1)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    extras = PROJECT["optional-dependencies"]
    assert done.stdout.splitlines() == [
        *PROJECT["dependencies"],
        *extras["transformers"],
        *extras["tracing"],
        *extras["store"],
    ]


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Answer /health with a status, any other path with 404, on the port that is returned."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run the image's health check. A proxy that does not exist stands for one that must not be asked."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "PYTHON"))}
    command = [sys.executable, str(DEPLOY / "docker/healthcheck.py")]
    environment = base | {"http_proxy": "http://127.0.0.1:9"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_asks_a_worker_or_a_frontend(status: int, healthy: bool) -> None:
    with answering(status) as port:
        worker = health(DYN_SYSTEM_PORT=str(port), DYN_HTTP_PORT="9")
        frontend = health(DYN_HTTP_PORT=str(port), DYN_HTTP_HOST="0.0.0.0")  # noqa: S104
    assert (worker.returncode == 0, frontend.returncode == 0) == (healthy, healthy), worker.stderr


def test_the_health_check_says_that_nobody_answers() -> None:
    done = health(DYN_SYSTEM_PORT="9")
    assert done.returncode == 1
    assert done.stderr.startswith("no answer on 127.0.0.1:9: ")


@every_image
def test_the_image_asks_with_it(dockerfile: Path) -> None:
    (copied,) = (each for each in instructions(dockerfile, "COPY") if "healthcheck.py" in each)
    (check,) = instructions(dockerfile, "HEALTHCHECK")
    assert copied.split()[-1] in check
