"""Many requests at the same moment for one new picture: encodes, and how long each request waits.

    python -m benchmarks.burst [--requests 64] [--rounds 5]

The stack that `launch/disagg_e_pd.sh` starts, with a small random model. All requests of a round show one
new picture and ask for one token. `alone` is one request for a picture of its own, before each round. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
from tqdm import tqdm

from benchmarks.dataset import data_url, picture
from benchmarks.measuring import finish
from tests.e2e.stack import Stack, launched
from tools.tiny_models import make_tiny_model

PIXELS = 336


async def burst(client: openai.AsyncOpenAI, model: str, seed: int, requests: int) -> list[float]:
    """Ask `requests` times at once about one picture; return the seconds to each answer's only token."""
    image = {"type": "image_url", "image_url": {"url": data_url(picture(seed, PIXELS))}}
    message: Any = {"role": "user", "content": [image, {"type": "text", "text": "what is it"}]}

    async def ask() -> float:
        began = time.perf_counter()
        await client.chat.completions.create(model=model, messages=[message], max_tokens=1)
        return time.perf_counter() - began

    return await asyncio.gather(*(ask() for _ in range(requests)))


async def measure(stack: Stack, requests: int, rounds: int) -> dict[str, Any]:
    """Send the bursts; return encodes of each round and percentiles over all requests in milliseconds."""
    seconds: list[float] = []
    alone: list[float] = []
    encodes: list[int] = []
    async with openai.AsyncOpenAI(base_url=stack.url, api_key="none", timeout=120, max_retries=0) as client:
        await burst(client, stack.model, 7_000_000, 2)
        for number in tqdm(range(rounds)):
            alone += await burst(client, stack.model, 7_100_000 + number, 1)
            before = await asyncio.to_thread(stack.encodes)
            seconds += await burst(client, stack.model, 7_200_000 + number, requests)
            encodes.append(round(await asyncio.to_thread(stack.encodes) - before))
    return {
        "requests": requests,
        "encodes": encodes,
        "ms": {f"p{cut}": round(1e3 * float(np.percentile(seconds, cut)), 1) for cut in (1, 50, 99)},
        "alone_ms": round(1e3 * float(np.median(alone)), 1),
    }


def main() -> None:
    """Parse the command line, start the stack, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=64, help="at the same moment")
    parser.add_argument("--rounds", type=int, default=5, help="bursts, each for a new picture")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model("qwen2_vl", Path(scratch) / "cpu-demo")
        with launched(
            Path(scratch) / "run",
            *("--multimodal-embedding-cache-capacity-gb", "0.125"),
            MODEL_PATH=str(model),
        ) as stack:
            finish("burst", asyncio.run(measure(stack, options.requests, options.rounds)), options.out)


if __name__ == "__main__":
    main()
