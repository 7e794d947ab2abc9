"""What is asked of one arm of `vllm.py`, and how long each answer takes.

Of every answer it is counted how many images were encoded for it: a hit that ran the vision tower, or an
image that vLLM alone did not encode again, ends the run with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from benchmarks.encoding import noise

IN_FLIGHT = 4
"""Requests that are under way together where requests a second are measured; four of 35 MB fill the cache."""


class Arm(Protocol):
    """Answers one token about an image's file. `llm` is vLLM, `caches` whether an image is encoded once."""

    llm: Any
    caches: bool

    async def ask(self, media: bytes) -> float:
        """Return when the first token was there, by `time.perf_counter`, once the request has ended."""
        ...

    async def encoded(self) -> int:
        """Return how many images were encoded."""
        ...


async def milliseconds(ask: Callable[[], Awaitable[float]]) -> float:
    """Return how long it took to the first token."""
    began = time.perf_counter()
    return (await ask() - began) * 1e3


async def per_second(asks: Sequence[Callable[[], Awaitable[float]]]) -> float:
    """Return the requests a second of some that are under way together, to the end of the last."""
    began = time.perf_counter()
    await asyncio.gather(*(ask() for ask in asks))
    return len(asks) / (time.perf_counter() - began)


class Measurement:
    """Asks one arm about images, each new to it and then once more, with vLLM's own caches empty."""

    def __init__(self, arm: Any, seed: int) -> None:
        self._arm = arm
        self._seed = seed

    async def images(self, width: int, height: int, repeats: int) -> dict[str, list[float]]:
        """Return milliseconds to the first token and requests a second, of misses and hits."""
        found: dict[str, list[float]] = {"miss": [], "hit": []}
        for repeat in range(repeats):
            await self._beside(found, width, height, repeat)
            media = self._new(width, height)
            for kind in ("miss", "hit"):
                async with self._checked(kind, 1):
                    found[kind].append(await milliseconds(partial(self._arm.ask, media)))
        together = [partial(self._arm.ask, self._new(width, height)) for _ in range(IN_FLIGHT)]
        for kind, rate in (("miss", "misses_per_s"), ("hit", "hits_per_s")):
            async with self._checked(kind, IN_FLIGHT):
                found[rate] = [await per_second(together)]
        return found

    async def _beside(self, found: dict[str, list[float]], width: int, height: int, repeat: int) -> None:
        """In one engine and in turns, new images by our way and past us: what we add to a miss."""
        plain = getattr(self._arm, "plain", None)
        if plain is None:
            return
        ways = [("ours_beside_plain", self._arm), ("plain", plain)]
        for kind, way in ways[:: 1 if repeat % 2 else -1]:
            one, *together = (partial(way.ask, self._new(width, height)) for _ in range(1 + IN_FLIGHT))
            async with self._checked(kind, 1):
                found.setdefault(kind, []).append(await milliseconds(one))
            async with self._checked(kind, IN_FLIGHT):
                found.setdefault(f"{kind}_per_s", []).append(await per_second(together))

    async def texts(self, rows: int, repeats: int) -> dict[str, list[float]]:
        """Return the same of a text, which there is no cache for: it is called a hit."""
        ask = partial(self._arm.text, rows)
        hits = [await milliseconds(ask) for _ in range(repeats)]
        return {"hit": hits, "hits_per_s": [await per_second([ask] * IN_FLIGHT)]}

    async def warmed(self) -> None:
        """Have everything loaded that the first request of an engine loads."""
        for _ in range(2):
            await self._arm.ask(self._new(224, 224))

    def _new(self, width: int, height: int) -> bytes:
        self._seed += 1
        return noise(self._seed, width, height)

    @contextlib.asynccontextmanager
    async def _checked(self, kind: str, images: int) -> AsyncIterator[None]:
        """Look that what is asked inside encodes as many images as it must; empty vLLM's cache afterwards."""
        before = await self._arm.encoded()
        yield
        encoded, due = await self._arm.encoded() - before, images
        if kind == "hit" and self._arm.caches:
            due = 0
        if encoded != due:
            raise SystemExit(f"{encoded} images were encoded for a {kind} of {images}, not {due}")
        await self._arm.llm.reset_encoder_cache()
