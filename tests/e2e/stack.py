"""Starts the real stack through the launch script and looks at it from outside: HTTP, metrics, pids."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Process:
    """One process of the stack, as the launch script recorded it."""

    name: str
    pid: int
    system_port: int
    log: Path

    def families(self) -> list[Metric]:
        """Scrape it: every metric of this moment."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.system_port}/metrics", timeout=5) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples whose labels include `labels`; 0 if it is not there."""
        return sum(
            sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def alive(self) -> bool:
        """Return whether the process runs (a zombie does not)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False


class Stack:
    """A running stack."""

    def __init__(self, launcher: subprocess.Popen[bytes], run_dir: Path, port: int, log: Path) -> None:
        self.launcher = launcher
        self.run_dir = run_dir
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log = log
        self.client = openai.OpenAI(base_url=self.url, api_key="none", timeout=60, max_retries=0)
        self.model = self.client.models.list().data[0].id

    @property
    def processes(self) -> list[Process]:
        """Every process that was started, in order."""
        lines = (self.run_dir / "processes.tsv").read_text().splitlines()
        rows = (line.split("\t") for line in lines)
        return [Process(name, int(pid), int(port), Path(log)) for name, pid, port, log in rows]

    def workers(self, kind: str) -> list[Process]:
        """Return the `encode` or the `PD` workers."""
        return [process for process in self.processes if process.name.startswith(f"{kind} worker")]

    def total(self, kind: str, metric: str, **labels: str) -> float:
        """Sum a metric over the live workers of one kind."""
        return sum(worker.metric(metric, **labels) for worker in self.workers(kind) if worker.alive())

    def encodes(self) -> float:
        """Images that went through a vision tower, over all live encode workers."""
        return self.total("encode", "trtllm_mm_cache_encodes_total")

    def ask(self, *parts: str | Image.Image, max_tokens: int = 8, **options: Any) -> str:
        """Send one user message of texts, image URLs and pictures, in order; return the answer."""
        answer = self.client.chat.completions.create(
            model=self.model, messages=[message(*parts)], max_tokens=max_tokens, **options
        )
        return answer.choices[0].message.content or ""

    def leave_an_answer(self) -> None:
        """Ask about a new image, leave in the middle of the answer, and wait until no lease is held."""
        (pd,) = self.workers("PD")
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[message(new_image(), "What is this?")],
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        leased = "trtllm_mm_cache_leased_bytes"
        assert pd.metric(leased, arena="cache") > 0
        stream.close()
        wait_until(lambda: pd.metric(leased, arena="cache") == 0, 10, "the lease was kept")

    def stop(self) -> int:
        """Stop as Ctrl-C does; return the launch script's exit status."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGINT)
        return self.launcher.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def launched(
    run_dir: Path,
    *pd_arguments: str,
    script: str = "disagg_e_pd.sh",
    ready_timeout_s: float = READY_TIMEOUT_S,
    **environment: str,
) -> Iterator[Stack]:
    """Start the stack, wait until it serves, and stop it; fails with the launch script's output."""
    run_dir.mkdir(parents=True)
    port, log = free_port(), run_dir / "launch.log"
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUN_DIR": str(run_dir),
        "DYN_HTTP_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            # A shell cannot trap a signal that was ignored when it began, as SIGINT is in background jobs.
            ["env", "--default-signal=INT", str(REPOSITORY / "launch" / script), *pd_arguments],
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until(
            lambda: b"Ctrl-C stops" in log.read_bytes() or launcher.poll() is not None,
            ready_timeout_s,
            "the stack did not become ready",
        )
        assert launcher.poll() is None, log.read_text()
        stack = Stack(launcher, run_dir, port, log)
        with stack.client:
            yield stack
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            # What takes longer to start takes longer to stop: a worker may be in the middle of an import.
            launcher.wait(max(STOP_TIMEOUT_S, ready_timeout_s / 4))


def arenas_of(pids: Iterable[int]) -> set[str]:
    """Return the names of the arenas in shared memory that these processes made: torch_<pid>_..."""
    folder = Path("/dev/shm")  # noqa: S108 - where the arenas are, not a temporary file
    owners = {str(pid) for pid in pids}
    return {path.name for path in folder.glob("torch_*") if path.name.split("_")[1] in owners}


def wait_until(condition: Callable[[], bool], timeout_s: float, failure: str) -> None:
    """Poll `condition` until it holds; fail with `failure` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{failure} within {timeout_s} s"
        time.sleep(0.05)


def pd_workers_seen(url: str) -> int:
    """Return how many PD workers the frontend at `url` has found; -1 while it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/').removesuffix('/v1')}/health", timeout=5) as answer:
            return int(json.load(answer)["pd_workers"])
    except OSError:
        return -1


def free_port() -> int:
    """Return a TCP port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def message(*parts: str | Image.Image) -> Any:
    """Build a user message; strings that are URLs become image parts, other strings text."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Image.Image):
            content.append(image_part(data_url(png(part))))
        elif part.startswith(("data:", "http://", "https://", "file:")):
            content.append(image_part(part))
        else:
            content.append({"type": "text", "text": part})
    return {"role": "user", "content": content}


def image_part(url: str) -> dict[str, Any]:
    """Build the image part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG, in its own mode."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(body: bytes) -> str:
    """Return `body` as a base64 data: URL."""
    return "data:image/png;base64," + base64.b64encode(body).decode()


_pictures = random.Random(20261124)


def new_image(width: int = 112, height: int = 112) -> Image.Image:
    """Return a picture that no test has used before: coarse random blocks of colour."""
    blocks = _pictures.randbytes(3 * 8 * 8)
    return Image.frombytes("RGB", (8, 8), blocks).resize((width, height), Image.Resampling.NEAREST)
