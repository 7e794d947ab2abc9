"""Run the stack under traffic that a reader can follow, and draw the dashboard of those minutes.

    python tools/dashboard_story.py docs/images/dashboard.png

The stack is the launch script's, with the demo model and two encode workers; the data are those of a real
Prometheus (Debian's package `prometheus`), which scrapes the workers every two seconds. `tell` is the story.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import yaml

from dashboard_data import Span
from demo import MODEL, ROOT, Stack, running_stack
from demo_model.pictures import GRIDS, draw, random_scene
from demo_model.questions import KINDS, ask_any
from draw_dashboard import draw_from

SCRAPE_S = 2
RATE = 6
"""Requests in a second."""
POOL, FITTING = 240, 120
"""Pictures in the pool, and how many of them the cache holds."""
BURST = 32
EMBEDDING_BYTES = 3328
"""Of a picture on average: 6.5 rows of 128 float32."""
ABOUT_ONE = [kind for kind, (pictures, _) in KINDS.items() if pictures == 1]
BROKEN = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n and nothing more").decode()
NO_IMAGE = "data:text/plain;base64,bm8gaW1hZ2U="


@dataclass(frozen=True)
class Card:
    """A picture and a question about it."""

    url: str
    question: str

    @classmethod
    def new(cls, rng: random.Random) -> Card:
        """Draw one."""
        scene = random_scene(rng, rng.choice(GRIDS))
        question = ask_any([scene], ABOUT_ONE, rng)
        buffer = io.BytesIO()
        draw(scene).save(buffer, "PNG")
        return cls("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), question.text)


@dataclass(frozen=True)
class Request:
    """A question about the images at `urls`."""

    urls: tuple[str, ...]
    question: str

    @classmethod
    def about(cls, *cards: Card) -> Request:
        """Ask the first card's question about all of them."""
        return cls(tuple(card.url for card in cards), cards[0].question)


class Traffic:
    """Requests to a stack, each in a thread of its own."""

    def __init__(self, stack: Stack, threads: ThreadPoolExecutor, seed: int) -> None:
        self._stack = stack
        self._threads = threads
        self._rng = random.Random(seed)
        self._pool = [Card.new(self._rng) for _ in range(POOL)]

    def steadily(self, seconds: float, make: Callable[[], Request]) -> None:
        """Send what `make` returns `RATE` times a second on average, whether or not the answers keep up.

        At random moments, as users do: even steps would keep time with the scrapes.
        """
        now = time.monotonic()
        end = now + seconds
        while (now := now + self._rng.expovariate(RATE)) < end:
            time.sleep(max(0, now - time.monotonic()))
            self._threads.submit(self._send, make())

    def burst(self) -> None:
        """Send many requests about one new picture at once, and wait for the answers."""
        request = self.something_new()
        sent = [self._threads.submit(self._send, request) for _ in range(BURST)]
        for each in sent:
            each.result()

    def something_new(self) -> Request:
        """Return a question about a picture that nobody has seen."""
        return Request.about(Card.new(self._rng))

    def something_known(self) -> Request:
        """Return one about pictures of the pool, the first ones more often; now and then about none."""
        weights = [1 / rank for rank in range(1, POOL + 1)]
        cards = self._rng.choices(self._pool, weights, k=self._rng.choice((0, 1, 1, 1, 1, 2)))
        return Request.about(*cards) if cards else Request((), "How many shapes are there?")

    def something_bad(self) -> Request:
        """Return `something_known`, but every fourth time an image that is none."""
        if self._rng.random() < 0.25:
            return Request((self._rng.choice((BROKEN, NO_IMAGE)),), "What is this?")
        return self.something_known()

    def _send(self, request: Request) -> None:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in request.urls]
        content.append({"type": "text", "text": request.question})
        with contextlib.suppress(openai.APIStatusError):  # some are refused: that is part of the story
            self._stack.client.chat.completions.create(
                model=self._stack.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=32,
                temperature=0,
            )


@dataclass
class Worker:
    """A process of the stack, which can be killed and started again as it was."""

    pid: int

    def __post_init__(self) -> None:
        process = Path(f"/proc/{self.pid}")
        self._command = [part.decode() for part in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = (process / "environ").read_bytes().decode().split("\0")[:-1]
        self._environment = dict(pair.split("=", 1) for pair in pairs)

    def kill(self) -> None:
        """End it as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def started_again(self, log: Path) -> Iterator[None]:
        """Run the same command in the same environment until the block ends."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command, env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def prometheus(binary: str, folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """Run Prometheus over `targets`, addresses by instance name; yield its URL."""
    scrapes = [{"targets": [address], "labels": {"instance": name}} for name, address in targets.items()]
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [{"job_name": "trtllm_mm_cache", "static_configs": scrapes}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}", "--log.level=warn"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def tell(traffic: Traffic, encode_worker: Worker, log: Path, seconds: float) -> Span:
    """Make the traffic of the whole story, `seconds` long; return when it was."""
    began = time.time()
    print("new pictures alone", flush=True)
    traffic.steadily(0.15 * seconds, traffic.something_new)
    print("a pool of pictures", flush=True)
    traffic.steadily(0.3 * seconds, traffic.something_known)
    print("a burst for one picture", flush=True)
    traffic.burst()
    traffic.steadily(0.1 * seconds, traffic.something_known)
    print("an encode worker killed", flush=True)
    encode_worker.kill()
    traffic.steadily(0.1 * seconds, traffic.something_known)
    print("and started again", flush=True)
    with encode_worker.started_again(log):
        traffic.steadily(0.15 * seconds, traffic.something_known)
        print("bad images", flush=True)
        traffic.steadily(0.1 * seconds, traffic.something_bad)
        traffic.steadily(0.1 * seconds, traffic.something_known)
        return Span(began, time.time(), SCRAPE_S)  # the worker that was started again is stopped here


def main() -> None:
    """Tell the story and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", default="prometheus", metavar="BINARY")
    parser.add_argument("--seconds", type=float, default=240, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the pictures (default: %(default)s)")
    parser.add_argument("output", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    folder = ROOT / ".run" / time.strftime("story-%Y%m%d-%H%M%S")
    capacity_gb = FITTING * EMBEDDING_BYTES / 1024**3
    with running_stack(folder, MODEL, capacity_gb, ENCODE_WORKERS="2") as stack:
        rows = [line.split("\t") for line in (folder / "processes.tsv").read_text().splitlines()]
        workers = {name: (int(pid), f"127.0.0.1:{port}") for name, pid, port, _ in rows if "worker" in name}
        targets = {name: address for name, (_, address) in workers.items()}
        with prometheus(arguments.prometheus, folder, targets) as url, ThreadPoolExecutor(64) as threads:
            victim = Worker(workers["encode worker 2"][0])
            traffic = Traffic(stack, threads, arguments.seed)
            span = tell(traffic, victim, folder / "encode-worker-2-again.log", arguments.seconds)
            draw_from(url, span, arguments.output)


if __name__ == "__main__":
    main()
