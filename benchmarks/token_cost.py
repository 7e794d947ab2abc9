"""What one token costs in the PD worker, beside the engine: `python -m benchmarks.token_cost`.

A generator that yields tokens as fast as it can, alone and behind the worker's handler; rounds interleaved.
Prints one JSON object, times in microseconds a token.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from dynamo.runtime import Context

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding, TokenDelta
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.receive import Receiver

TOKENS, ROUNDS = 5000, 7


class Counting:
    """A generator on the engine's interface that computes nothing and lets the loop turn at each token."""

    fingerprint = "ab" * 32

    def variant(self, image_count: int) -> str:
        """Return "": every image alike."""
        return ""

    def check_embedding(self, *announced: object) -> None:
        """Take everything: there are no images here."""

    async def generate(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> AsyncGenerator[TokenDelta]:
        """Count."""
        for number in range(TOKENS):
            await asyncio.sleep(0)
            yield TokenDelta((number,), 1, "stop" if number + 1 == TOKENS else None)

    async def close(self) -> None:
        """Free nothing."""


async def timed(answer: AsyncIterator[Any]) -> float:
    """Return the microseconds a token of reading `answer` to its end."""
    started = time.perf_counter()
    count = 0
    async for _ in answer:
        count += 1
    assert count == TOKENS, count  # noqa: S101 - a benchmark of something else would be worse than none
    return (time.perf_counter() - started) / TOKENS * 1e6


async def measure() -> dict[str, float]:
    """Return the medians."""
    settings, metrics, generator = PdSettings(model_path="unused"), PdMetrics(), Counting()
    cache = MultimodalEmbeddingCacheManager(1024**2)
    receiver = Receiver(cache, cache, None, generator.check_embedding, metrics.registry)
    resolver = ItemResolver(cache, None, TierChain([], receiver), generator.fingerprint, settings, metrics)
    worker = PdWorker(generator, resolver, metrics, settings)
    alone, served = [], []
    request: Any = None
    for _ in range(ROUNDS):
        alone.append(await timed(generator.generate(request, ())))
        served.append(await timed(worker.handle({"token_ids": [1]}, Context())))
    await worker.close()
    cache.close()
    both = {"generator_us": statistics.median(alone), "served_us": statistics.median(served)}
    return both | {"worker_us": both["served_us"] - both["generator_us"]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure())))
