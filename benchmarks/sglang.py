"""Time to the first token in one SGLang, from an image's file on: our cache, SGLang's own, and neither.

    python -m benchmarks.sglang [--repeats 9] [--sizes "448 px" "1024 px"]      (in SGLang's environment)

One engine on the model of `vllm_model.py`, asked in three ways in turn, in an order drawn anew for each
round; SGLang's prefix cache is off:

    miss, hit                   a new image: transformers' tower encodes it into the arena, in this process;
                                then asked about again
    sglang's miss, sglang's hit a new image: SGLang's own processor and tower; then again: its own embedding
                                cache (SGLANG_VLM_CACHE_SIZE_MB) answers, behind its processor
    text                        as many tokens of text

Then `sglang_handoff`: an embedding's way to the scheduler. The ratios are medians over pairs of one round.
The last line is one JSON object; times are milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.encoding import CachedTower, noise
from benchmarks.measuring import finish, median_ratio, say
from benchmarks.sglang_handoff import hand_over_all
from benchmarks.vllm_model import HIDDEN, LEVELS, write_wide_model
from tests.engines.contract import chat_case
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.sglang import SglangEngineArgs, SglangGenerator

SIDES = {"448 px": 448, "1024 px": 1024}
ENGINE = {
    "device": "cpu",
    "dtype": "bfloat16",
    "encoder_dtype": "bfloat16",
    "disable_radix_cache": True,
    "context_length": 4096,
    "max_total_tokens": 8192,
    "max_running_requests": 2,
}
RATIOS = {
    "hit / sglang's hit": ("hit", "sglang's hit"),
    "hit / sglang's miss": ("hit", "sglang's miss"),
    "miss / sglang's miss": ("miss", "sglang's miss"),
    "hit / text": ("hit", "text"),
}
FIRST_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)

Found = dict[str, float]


class Bench:
    """One SGLang with our generator over it, and a cache before a tower."""

    def __init__(self, model: Path) -> None:
        self.generator = SglangGenerator(model, SglangEngineArgs.model_validate(ENGINE))
        self.tower = CachedTower(model, self.generator.fingerprint)
        case = chat_case(model, [Image.new("RGB", (64, 64))], ["", "What is it?"])
        self._prompt = case.prompt
        self._request = replace(case.request, sampling=FIRST_TOKEN)

    async def ours(self, media: bytes) -> int:
        """Have our generator give the first token about an image's file; return the prompt's tokens."""
        lease = self.tower.known(media) or await asyncio.to_thread(self.tower.lease, media)
        with lease:
            return await self._generate(self._request, lease)

    async def text(self, tokens: int) -> int:
        """Ask with a text of so many tokens."""
        ids = tuple(int(each) for each in np.random.default_rng(tokens).integers(10, 200, tokens))
        return await self._generate(replace(self._request, token_ids=ids, prompt_text=None))

    async def _generate(self, request: Any, *leases: Any) -> int:
        tokens = 0
        async with aclosing(self.generator.generate(request, leases)) as deltas:
            async for delta in deltas:
                tokens = delta.prompt_tokens
        return tokens

    async def sglangs(self, media: bytes) -> int:
        """Have SGLang by itself give the first token about an image's file; return the prompt's tokens."""
        engine = self.generator._engine
        if engine is None:
            raise SystemExit("the engine has ended")
        arguments = {
            "prompt": self._prompt,
            "image_data": [media],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
            "stream": True,
        }
        engine.manager.mm_processor = engine.inputs.processor
        try:
            stream: AsyncIterator[dict[str, Any]] = await engine.generate(uuid.uuid4().hex, arguments)
            outputs = [output async for output in stream]
        finally:
            engine.manager.mm_processor = engine.inputs
        return int(outputs[-1]["meta_info"]["prompt_tokens"])

    async def round(self, order: random.Random, side: int, seed: int, length: int) -> Found:
        """Ask in every way once, each a prompt of `length` tokens; return the milliseconds."""
        found: Found = {}

        async def timed(way: str, ask: Awaitable[int]) -> None:
            began = time.perf_counter()
            tokens = await ask
            found[way] = (time.perf_counter() - began) * 1e3
            if tokens != length:
                raise SystemExit(f"{way}: {tokens} prompt tokens instead of {length}")

        async def twice(ask: Callable[[bytes], Awaitable[int]], whose: str, seed: int) -> None:
            media = noise(seed, side, side)
            await timed(f"{whose}miss", ask(media))
            await timed(f"{whose}hit", ask(media))

        async def text() -> None:
            await timed("text", self.text(length))

        ways = [
            lambda: twice(self.ours, "", seed),
            lambda: twice(self.sglangs, "sglang's ", seed + 1),
            text,
        ]
        encoded = self.tower.encoded
        for way in order.sample(ways, len(ways)):
            await way()
        if self.tower.encoded != encoded + 1:
            raise SystemExit("the tower ran for something else than the new image")
        return found

    async def close(self) -> None:
        """End the engine and free the arena."""
        await self.generator.close()
        self.tower.close()


def summary(rounds: list[Found]) -> dict[str, Any]:
    """Return medians in milliseconds and ratios of one size."""
    numbers = {way: [found[way] for found in rounds] for way in rounds[0]}
    return {
        "rounds": len(rounds),
        "median_ms": {way: round(statistics.median(values), 1) for way, values in numbers.items()},
        "ratios": {
            name: round(median_ratio(numbers[one], numbers[other]), 3)
            for name, (one, other) in RATIOS.items()
        },
    }


async def first_tokens(hidden: int, sides: dict[str, int], repeats: int, most_s: float) -> dict[str, Any]:
    """Measure every size, after one round that does not count; begin no round after `most_s` seconds."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_wide_model(Path(folder) / "model", hidden=hidden)
        bench = await asyncio.to_thread(Bench, model)
        order = random.Random(1)
        try:
            for name, side in sides.items():
                length = await bench.ours(noise(side, side, side))
                await bench.round(order, side, side * 1000, length)
                rounds: list[Found] = []
                until = time.monotonic() + most_s / len(sides)
                while len(rounds) < repeats and (not rounds or time.monotonic() < until):
                    rounds.append(await bench.round(order, side, side * 1000 + 2 * len(rounds) + 2, length))
                results[name] = summary(rounds)
                say(f"{name}: {results[name]}")
        finally:
            await bench.close()
    return results


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each size")
    parser.add_argument(
        "--most-s", type=float, default=300, help="begin no further round after these seconds"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the model, for a small run")
    parser.add_argument("--out", type=Path, help="file for the result, besides standard output")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # SGLang's processes
    os.environ["SGLANG_VLM_CACHE_SIZE_MB"] = "1024"
    torch.set_num_threads(1)
    sides = {name: SIDES[name] for name in given.sizes}
    found = asyncio.run(first_tokens(given.hidden, sides, given.repeats, given.most_s))
    results = {
        "columns": given.hidden * (1 + LEVELS),
        "repeats": given.repeats,
        "first_token": found,
        "handoff": hand_over_all(2 * given.repeats + 1),
    }
    finish("sglang", results, given.out)


if __name__ == "__main__":
    main()
