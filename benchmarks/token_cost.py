"""What one token costs in the PD worker, beside the engine.

    python -m benchmarks.token_cost [--rounds 7]

A generator that yields a token every half millisecond, read alone and through the worker's handler, in turn.
The last line is one JSON object: medians of the processor time a token, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from dynamo.runtime import Context

from benchmarks.measuring import finish
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding, TokenDelta
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.receive import Receiver

TOKENS, PAUSE_S = 1000, 0.0005


class Counting:
    """A generator on the engine's interface that computes nothing: each token comes by itself."""

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
            await asyncio.sleep(PAUSE_S)
            yield TokenDelta((number,), 1, "stop" if number + 1 == TOKENS else None)

    async def close(self) -> None:
        """Free nothing."""


async def timed(answer: AsyncIterator[Any]) -> float:
    """Return the processor's microseconds a token for reading `answer` to its end."""
    started = time.process_time()
    count = 0
    async for _ in answer:
        count += 1
    assert count == TOKENS, count  # noqa: S101 - a benchmark of something else would be worse than none
    return (time.process_time() - started) / TOKENS * 1e6


async def measure(rounds: int) -> dict[str, float]:
    """Return the medians of `rounds` answers each way."""
    settings, metrics, generator = PdSettings(model_path="unused"), PdMetrics(), Counting()
    cache = MultimodalEmbeddingCacheManager(1024**2)
    receiver = Receiver(cache, cache, None, generator.check_embedding, metrics.registry)
    resolver = ItemResolver(cache, None, TierChain([], receiver), generator.fingerprint, settings, metrics)
    worker = PdWorker(generator, resolver, metrics, settings, lambda _: {})
    alone, served = [], []
    request: Any = None
    for _ in range(rounds):
        alone.append(await timed(generator.generate(request, ())))
        served.append(await timed(worker.handle({"token_ids": [1]}, Context())))
    await worker.close()
    cache.close()
    in_generator, in_all = statistics.median(alone), statistics.median(served)
    return {"generator": in_generator, "served": in_all, "worker": in_all - in_generator}


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="answers of a thousand tokens each way")
    rounds = parser.parse_args().rounds
    finish("token_cost", {"rounds": rounds, "median_us": asyncio.run(measure(rounds))})


if __name__ == "__main__":
    main()
