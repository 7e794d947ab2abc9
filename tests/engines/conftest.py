"""Tiny models and both halves of each, made and loaded once a run."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engines.contract import ARCHITECTURES
from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import (
    TransformersEngineArgs,
    TransformersGenerator,
    TransformersVisionEncoder,
)

ModelFactory = Callable[[str], Path]


def stored(cache: MultimodalEmbeddingCacheManager, key: str, encoded: EncodedItem) -> Lease:
    """Put an embedding into a cache as the workers do, and hold it."""
    tensor = encoded.tensor
    reservation = cache.reserve(key, tensor.nbytes, owner="test")
    reservation.write(tensor)
    return reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape), metadata=encoded.metadata)


@dataclass
class Halves:
    """Both halves of one model and a cache between them, in one process."""

    model_dir: Path
    encoder: TransformersVisionEncoder
    generator: TransformersGenerator
    cache: MultimodalEmbeddingCacheManager = field(
        default_factory=lambda: MultimodalEmbeddingCacheManager(16 << 20)
    )
    _keys: Iterator[int] = field(default_factory=itertools.count)

    def encode(self, item: EncodeItem) -> EncodedItem:
        """Encode one item alone."""
        (result,) = self.encoder.encode([self.encoder.preprocess(item)])
        assert isinstance(result, EncodedItem), result
        return result

    def lease(self, encoded: EncodedItem) -> Lease:
        """Put an embedding into the cache and hold it."""
        return stored(self.cache, str(next(self._keys)), encoded)

    def carry(self, items: Sequence[EncodeItem]) -> list[Lease]:
        """Encode one by one, through the cache: see `contract.Carry`."""
        return [self.lease(self.encode(item)) for item in items]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Return the directory of an architecture's tiny model, made at its first use."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda architecture: make_tiny_model(architecture, root / architecture))


@pytest.fixture(scope="session")
def halves_of(model_of: ModelFactory) -> Iterator[Callable[[str], Halves]]:
    """Return both halves of an architecture, loaded at its first use."""
    loaded: dict[str, Halves] = {}

    def load(architecture: str) -> Halves:
        if architecture not in loaded:
            model_dir, args = model_of(architecture), TransformersEngineArgs(device="cpu")
            encoder, generator = (
                TransformersVisionEncoder(model_dir, args),
                TransformersGenerator(model_dir, args),
            )
            loaded[architecture] = Halves(model_dir, encoder, generator)
        return loaded[architecture]

    yield load
    for halves in loaded.values():
        halves.encoder.close()
        asyncio.run(halves.generator.close())
        halves.cache.check_integrity()


@pytest.fixture(params=ARCHITECTURES)
def halves(request: pytest.FixtureRequest, halves_of: Callable[[str], Halves]) -> Halves:
    """Both halves of each architecture in turn."""
    return halves_of(request.param)


@pytest.fixture
def small(halves_of: Callable[[str], Halves]) -> Halves:
    """Both halves of a model that decodes a token in about a millisecond, for what all models share."""
    return halves_of("llava")
