"""Which PD worker a request goes to: how often an item is found, and how often it is kept twice.

    python -m benchmarks.routing [--images 60] [--requests 300] [--workers 1 2 4]

The stack of the launch script with 1, 2 and 4 PD workers, asked about images of unequal popularity (Zipf,
0.9): first through our frontend, which sends a request where its images' cache is, then, after everything was
dropped, through Dynamo's own, which takes the workers in turn. One request at a time, so that every miss is a
first sight or a second copy. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import openai

from benchmarks.dataset import data_url, picture
from benchmarks.frontend import MODEL, started, wait_ready
from benchmarks.measuring import finish, say
from tests.e2e.stack import Stack, free_port, image_part, launched

ZIPF = 0.9


def ask(client: openai.OpenAI, number: int) -> None:
    """Ask about one image."""
    content: list[Any] = [
        image_part(data_url(picture(number, 112, 112))),
        {"type": "text", "text": "What is it?"},
    ]
    client.chat.completions.create(
        model=MODEL.name, max_tokens=1, messages=[{"role": "user", "content": content}]
    )


def figures(stack: Stack, before: dict[str, float]) -> dict[str, float]:
    """Return hits and misses since `before`, and what lies in the PD workers' caches now."""
    now = counts(stack)
    hits, misses = now["hits"] - before["hits"], now["misses"] - before["misses"]
    return {
        "hit_ratio": round(hits / (hits + misses), 4),
        "misses": misses,
        "entries": now["entries"],
        "kilobytes": round(now["bytes"] / 1024, 1),
    }


def counts(stack: Stack) -> dict[str, float]:
    """Return the sums over all PD workers."""
    return {
        "hits": stack.total("PD", "dynamo_component_embedding_cache_hits_total"),
        "misses": stack.total("PD", "dynamo_component_embedding_cache_misses_total"),
        "entries": stack.total("PD", "dynamo_component_embedding_cache_entries"),
        "bytes": stack.total("PD", "dynamo_component_embedding_cache_current_bytes"),
    }


def measure(workers: int, images: int, requests: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the figures of both frontends before so many PD workers."""
    drawn = random.Random(1).choices(
        range(images), weights=[1 / (rank + 1) ** ZIPF for rank in range(images)], k=requests
    )
    report = {}
    with (
        launched(
            folder / f"run-{workers}",
            *("--multimodal-embedding-cache-capacity-gb", "0.03125"),
            MODEL_PATH=str(MODEL),
            PD_WORKERS=str(workers),
            MM_CACHE_ALLOW_UNPROVEN_REQUESTS="1",
        ) as stack,
        started(
            str(stack.run_dir / "discovery"),
            "-m",
            "benchmarks.frontend",
            "--dynamo",
            str(port := free_port()),
        ),
    ):
        asyncio.run(wait_ready(port))
        for name, url in (("ours", stack.url), ("dynamo", f"http://127.0.0.1:{port}/v1")):
            before = counts(stack)
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                for number in drawn:
                    ask(client, number)
            report[name] = figures(stack, before)
            drop_all(stack)
    return report


def drop_all(stack: Stack) -> None:
    """Drop everything on every worker."""
    environment = os.environ | {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(stack.run_dir / "discovery"),
        "MM_CACHE_SECRET_FILE": str(stack.run_dir / "secret"),
    }
    command = [sys.executable, "-m", "trtllm_mm_cache.cli", "drop", "--all"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {}
        for workers in arguments.workers:
            report[str(workers)] = measure(workers, arguments.images, arguments.requests, Path(folder))
            say(f"{workers} PD workers: done")
    finish("routing", report)


if __name__ == "__main__":
    main()
