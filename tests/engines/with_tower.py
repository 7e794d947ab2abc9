"""A generator of another package, a transformers tower, and a cache between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tests.engines.answers import Answer, collect
from tests.engines.conftest import stored
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, GenerationRequest, Generator, SamplingParams
from trtllm_mm_cache.engines.transformers import TransformersVisionEncoder

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=20)


@dataclass
class EngineWithTower:
    """One model."""

    deadline_s: ClassVar[float]
    """For a whole answer."""

    model_dir: Path
    generator: Generator
    encoder: TransformersVisionEncoder
    cache: MultimodalEmbeddingCacheManager = field(
        default_factory=lambda: MultimodalEmbeddingCacheManager(8 << 20), kw_only=True
    )
    _keys: Any = field(default_factory=itertools.count, kw_only=True)

    def encode(self, image: Image.Image, beside: int = 1) -> EncodedItem:
        """Encode one image by transformers' tower, for a prompt with `beside` images."""
        item = EncodeItem(image, variant=self.generator.variant(beside))
        (result,) = self.encoder.encode([self.encoder.preprocess(item)])
        assert isinstance(result, EncodedItem), result
        return result

    def lease(self, encoded: EncodedItem, key: str | None = None) -> Lease:
        """Put an embedding into the cache and hold it; under a new key unless one is given."""
        digest = content_digest((key or str(next(self._keys))).encode())
        return stored(self.cache, embedding_key(digest, fingerprint=self.generator.fingerprint).hex, encoded)

    async def answers(
        self, request: GenerationRequest, leases: Sequence[Lease], sampling: SamplingParams = GREEDY
    ) -> list[Answer]:
        """Return all choices of an answer of our generator's."""
        deltas = self.generator.generate(replace(request, sampling=sampling), leases)
        async with asyncio.timeout(self.deadline_s), aclosing(deltas):
            return await collect(deltas, sampling.choices)

    async def answer(
        self, request: GenerationRequest, leases: Sequence[Lease], sampling: SamplingParams = GREEDY
    ) -> Answer:
        """Return the one answer of our generator's."""
        (answer,) = await self.answers(request, leases, sampling)
        return answer
