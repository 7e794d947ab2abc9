"""The three arms of `serving.py`: no cache, the cache, and the ideal that a cache could reach.

`off`    capacity 0, and `--multimodal-embedding-cache-require-salt` with requests that carry none: nothing
         is retained on either worker, and two requests for one picture do not share an encode.
`on`     a cache that holds all pictures, and has none of a run's when the run begins.
`ideal`  the stack of `on`, with new pictures once more, but a picture that came before is text of as many
         tokens: the language model does the same work, and the picture costs nothing at all - no bytes to
         send, no fetch, no key, no lookup, no encode, no transfer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.aiperf import LoadRun, profile
from benchmarks.dataset import Request, data_url, picture, write_aiperf
from tests.e2e.stack import Stack, launched

CACHE = "dynamo_component_embedding_cache_"
ARMS = ("off", "on", "ideal")
CACHE_GB = "0.25"


@dataclass(frozen=True)
class Load:
    """What to send: requests, the size of the pictures in pixels, and how."""

    requests: Sequence[Request]
    width: int
    height: int
    concurrency: int
    output_tokens: int


@dataclass(frozen=True)
class ArmRun:
    """One run of one arm: what AIPerf saw, and what the workers counted meanwhile."""

    load: LoadRun
    encodes: int
    hits: int
    misses: int
    cpu_s: float


@dataclass(frozen=True)
class Stacks:
    """Both stacks, up at the same time; only one of them is used at a time."""

    off: Stack
    on: Stack
    model: Path
    aiperf: Path
    folder: Path

    def run(self, arm: str, load: Load, number: int) -> ArmRun:
        """Run one arm; `number` is another one for each run of the same arm, and decides the pictures."""
        stack = self.off if arm == "off" else self.on
        folder = self.folder / f"{number}-{arm}"
        folder.mkdir()
        requests = folder / "requests.jsonl"
        stand_in = self.stand_in(load) if arm == "ideal" else None
        write_aiperf(
            requests,
            load.requests,
            first_seed=1_000_000 * (2 * number + (arm == "ideal")),
            width=load.width,
            height=load.height,
            stand_in=stand_in,
        )
        before = _counts(stack)
        measured = profile(
            self.aiperf,
            url=stack.url.removesuffix("/v1"),
            model=stack.model,
            tokenizer=self.model,
            requests=requests,
            count=len(load.requests),
            concurrency=load.concurrency,
            output_tokens=load.output_tokens,
            folder=folder / "aiperf",
            timeout_s=280,
        )
        encodes, hits, misses, cpu_s = (
            after - earlier for after, earlier in zip(_counts(stack), before, strict=True)
        )
        return ArmRun(measured, round(encodes), round(hits), round(misses), cpu_s)

    def stand_in(self, load: Load) -> str:
        """Return a text of as many prompt tokens as a picture has, as the server itself counts."""
        shown = data_url(picture(9_000_000, load.width, load.height))
        without = prompt_tokens(self.on, "the")
        wanted = prompt_tokens(self.on, "the", shown) - without
        words = wanted
        for _ in range(5):  # at a text's start and end a word can take another number of tokens
            text = " ".join(["a"] * words)
            found = prompt_tokens(self.on, f"{text} the") - without
            if found == wanted:
                return text
            words += wanted - found
        raise SystemExit(
            f"a picture has {wanted} tokens and its stand-in {found}: the ideal is not measurable"
        )


@contextlib.contextmanager
def stacks(model: Path, aiperf: Path, folder: Path) -> Iterator[Stacks]:
    """Start both stacks, warm them up, and stop them at the end."""
    capacity = "--multimodal-embedding-cache-capacity-gb"
    salt = "--multimodal-embedding-cache-require-salt"
    environment = {"MODEL_PATH": str(model)}
    with (
        launched(folder / "off", capacity, "0", salt, **environment) as off,
        launched(folder / "on", capacity, CACHE_GB, **environment) as on,
    ):
        for stack in (off, on):
            for seed in range(3):
                stack.ask(data_url(picture(8_000_000 + seed, 336)), "what is it", max_tokens=16)
        yield Stacks(off, on, model, aiperf, folder)


def prompt_tokens(stack: Stack, *parts: str) -> int:
    """Return how many tokens the prompt of these parts has in the engine."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    answer = stack.client.chat.completions.create(
        model=stack.model, messages=[{"role": "user", "content": content}], max_tokens=1
    )
    if answer.usage is None:
        raise SystemExit("the server reports no token counts")
    return answer.usage.prompt_tokens


def _counts(stack: Stack) -> tuple[float, float, float, float]:
    return (
        stack.encodes(),
        stack.total("PD", f"{CACHE}hits_total"),
        stack.total("PD", f"{CACHE}misses_total"),
        sum(_cpu_seconds(process.pid) for process in stack.processes),
    )


def _cpu_seconds(pid: int) -> float:
    """Return the processor time, user and system, that a process and its threads have taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
