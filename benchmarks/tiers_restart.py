"""The first answers after a restart: of what was encoded, lies in the arena, on disk, or in a store.

    python -m benchmarks.tiers_restart [--images 40]

The whole stack with the demo model, four times, each with an empty arena: `encode`, the first time that an
image is asked about, and `arena`, the second; then, all of it started anew, `disk` with the files in the page
cache and `disk_cold` without, and `store`. From the request to the first token, at the client, in
milliseconds; no two requests at once. Every answer is compared with the first one's. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.measuring import finish, say
from tests.e2e.stack import Stack, launched, message, new_image, wait_until
from tests.tiers.bench import redis_running

CACHE = ("--multimodal-embedding-cache-capacity-gb", "0.25")
QUESTION = "What is this?"


def first_token_ms(stack: Stack, image: Image.Image) -> tuple[float, str]:
    """Ask about an image; return the time to the first token, and the answer."""
    asked: Any = message(image, QUESTION)
    began = time.perf_counter()
    stream = stack.client.chat.completions.create(
        model=stack.model, messages=[asked], max_tokens=8, temperature=0, stream=True
    )
    first, text = 0.0, ""
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content and not first:
                first = (time.perf_counter() - began) * 1e3
            text += choice.delta.content or ""
    return first, text


def ask_all(stack: Stack, images: Sequence[Image.Image], answers: dict[int, str]) -> list[float]:
    """Ask about each image once. An image that is none of them comes first, to warm everything up."""
    first_token_ms(stack, new_image(448, 448))
    times = []
    for number, image in enumerate(images):
        spent, text = first_token_ms(stack, image)
        if answers.setdefault(number, text) != text:
            raise SystemExit("a wrong answer")
        times.append(spent)
    return times


def run(count: int, folder: Path, port: int) -> dict[str, Any]:
    """Start the stack four times."""
    secret = folder / "secret"
    secret.write_text("s" * 64)
    secret.chmod(0o600)
    disk = ("--multimodal-embedding-cache-disk-path", str(folder / "disk"))
    sealed = ("--multimodal-embedding-cache-secret-file", str(secret))
    store = ("--multimodal-embedding-cache-store-url", f"redis://127.0.0.1:{port}")
    images = [new_image(448, 448) for _ in range(count)]
    answers: dict[int, str] = {}
    times: dict[str, list[float]] = {}
    with launched(folder / "run-1", *CACHE, *disk, *store, *sealed) as stack:
        times["encode"] = ask_all(stack, images, answers)
        times["arena"] = ask_all(stack, images, answers)
        name, labels = "trtllm_mm_cache_tier_offers_total", {"outcome": "stored"}
        wait_until(lambda: stack.total("PD", name, **labels) == 2 * count, 60, "not all is stored")
    for way, options in (("disk", disk), ("disk_cold", disk), ("store", store)):
        if way == "disk_cold":
            forget(folder / "disk")
        with launched(folder / f"run-{way}", *CACHE, *options, *sealed) as stack:
            times[way] = ask_all(stack, images, answers)
            if stack.encodes() != 1:  # that of the image to warm up
                raise SystemExit(f"{way}: {stack.encodes() - 1:.0f} images were encoded again")
    return {
        way: {"min": round(min(one), 1), "median": round(statistics.median(one), 1)}
        for way, one in times.items()
    }


def forget(folder: Path) -> None:
    """Have the kernel write every file out and forget its pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The first answers after a restart; see the file.")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tiers-") as folder, redis_running() as (port, _):
        results = run(arguments.images, Path(folder), port)
    say(str(results))
    finish("tiers_restart", {"images": arguments.images, "first_token_ms": results}, arguments.out)


if __name__ == "__main__":
    main()
