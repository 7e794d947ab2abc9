"""Start the whole stack with the demo model, ask it about three drawn images, print what happened, stop.

`make demo` runs it. A miss is a question whose image the PD worker had to have encoded, a hit one
whose embedding it already kept; both are read off the PD worker's own metrics.
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
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families

from demo_model.pictures import Scene, draw, random_scene
from demo_model.questions import Question, ask

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/shapes-qwen2-vl"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 30
CACHE = "dynamo_component_embedding_cache_"
GRIDS = ((2, 2), (2, 3), (3, 3))
"""Rows and columns of the three images."""
PLAN = (
    *((("A",), "describe"), (("A",), "count")),
    *((("B",), "neighbour"), (("B",), "colour")),
    *((("C",), "number"), (("C",), "place")),
    *((("A", "B"), "which picture"), (("B", "C"), "in one picture")),
)
"""Which images are asked about, and what kind of question."""


@dataclass(frozen=True)
class Row:
    """One question that was asked, and what came back."""

    images: str
    question: Question
    answer: str
    cache: str
    first_token_ms: float

    @property
    def verdict(self) -> str:
        """`right` if the answer is the truth, letter by letter."""
        return "right" if self.answer == self.question.answer else f"wrong ({self.question.answer})"


@dataclass(frozen=True)
class Stack:
    """The running stack: its OpenAI client, and the PD worker's metrics."""

    client: openai.OpenAI
    model: str
    pd_metrics_url: str

    def cache(self) -> dict[str, float]:
        """Return the cache's numbers now, without the common prefix of their names."""
        with urllib.request.urlopen(self.pd_metrics_url, timeout=5) as answer:  # noqa: S310 - our own http
            text = answer.read().decode()
        return {
            sample.name.removeprefix(CACHE): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(CACHE)
        }

    def ask(self, images: Sequence[str], scenes: Sequence[Scene], question: Question) -> Row:
        """Send one question about `scenes`; `images` are their letters."""
        before = self.cache()
        content = [{"type": "image_url", "image_url": {"url": _data_url(scene)}} for scene in scenes]
        content.append({"type": "text", "text": question.text})
        started = time.perf_counter()
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
            max_tokens=48,
            temperature=0,
            stream=True,
        )
        parts, first_token_ms = [], 0.0
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first_token_ms = first_token_ms or 1000 * (time.perf_counter() - started)
                parts.append(chunk.choices[0].delta.content)
        after = self.cache()
        hits, misses = (int(after[name] - before[name]) for name in ("hits_total", "misses_total"))
        cache = " + ".join(["hit"] * hits + ["miss"] * misses)
        return Row("+".join(images), question, "".join(parts), cache, first_token_ms)


def _data_url(scene: Scene) -> str:
    buffer = io.BytesIO()
    draw(scene).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextlib.contextmanager
def running_stack(
    run_dir: Path, model: Path, capacity_gb: float = 0.0625, **variables: str
) -> Iterator[Stack]:
    """Start the launch script on a free port, wait until it serves, and stop it in the end.

    `variables` are the launch script's; `capacity_gb` is the PD worker's.
    """
    run_dir.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = run_dir / "launch.log"
    environment = {"MODEL_PATH": str(model), "RUN_DIR": str(run_dir), "DYN_HTTP_PORT": str(port)}
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [
                str(ROOT / "launch/disagg_e_pd.sh"),
                *("--multimodal-embedding-cache-capacity-gb", str(capacity_gb)),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_serving(launcher, log)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="not-needed", timeout=60, max_retries=0
        )
        yield Stack(client, client.models.list().data[0].id, _pd_metrics_url(run_dir))
    finally:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(STOP_TIMEOUT_S)


def _wait_until_serving(launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the launch script says so; exit with its last lines when it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while b"] serving " not in log.read_bytes():
        if launcher.poll() is not None or time.monotonic() > deadline:
            sys.exit("the stack did not start:\n" + "\n".join(log.read_text().splitlines()[-25:]))
        time.sleep(0.1)


def _pd_metrics_url(run_dir: Path) -> str:
    for line in (run_dir / "processes.tsv").read_text().splitlines():
        name, _, port, _ = line.split("\t")
        if name.startswith("PD worker"):
            return f"http://127.0.0.1:{port}/metrics"
    raise LookupError("the launch script recorded no PD worker")


def draw_cards(rng: random.Random) -> tuple[dict[str, Scene], list[Question]]:
    """Return three scenes by letter, and a question for each entry of `PLAN`."""
    while True:
        scenes = {letter: random_scene(rng, grid) for letter, grid in zip("ABC", GRIDS, strict=True)}
        questions = [ask([scenes[letter] for letter in letters], kind, rng) for letters, kind in PLAN]
        found = [question for question in questions if question is not None]
        if len(found) == len(PLAN):
            return scenes, found


def ask_everything(stack: Stack, rng: random.Random, folder: Path) -> Iterator[Row]:
    """Draw three images into `folder`, and yield the answers to `PLAN`."""
    scenes, questions = draw_cards(rng)
    for letter, scene in scenes.items():
        draw(scene).save(folder / f"{letter}.png")
    for (letters, _), question in zip(PLAN, questions, strict=True):
        yield stack.ask(letters, [scenes[letter] for letter in letters], question)


def main() -> None:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR")
    parser.add_argument("--seed", type=int, default=7, help="of the images (default: %(default)s)")
    arguments = parser.parse_args()
    run_dir = ROOT / ".run" / time.strftime("demo-%Y%m%d-%H%M%S")
    print("starting a frontend, an encode worker and a PD worker ...", flush=True)
    with running_stack(run_dir, arguments.model) as stack:
        layout = "{:<8} {:<64} {:<61} {:<7} {:<9} {:>11}"
        print(layout.format("image", "question", "answer", "verdict", "cache", "first token"))
        for row in ask_everything(stack, random.Random(arguments.seed), run_dir):
            time_ms = f"{row.first_token_ms:.0f} ms"
            print(
                layout.format(row.images, row.question.text, row.answer, row.verdict, row.cache, time_ms),
                flush=True,
            )
        print("\nthe PD worker's cache:")
        for name, value in sorted(stack.cache().items()):
            print(f"  {name:<24} {value:g}")
        print(f"\nimages and logs: {run_dir.relative_to(ROOT)}; stopping ...", flush=True)


if __name__ == "__main__":
    main()
