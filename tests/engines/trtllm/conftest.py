"""The adapter over the peer of TensorRT-LLM, loaded once a run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engines.conftest import ModelFactory, stored
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.trtllm import (
    TrtllmEncoderArgs,
    TrtllmGenerator,
    TrtllmLlmArgs,
    TrtllmVisionEncoder,
)

PEER = Path(__file__).resolve().parents[2] / "trtllm_peer"
SERVED = ("qwen3_vl", "llava_next")
"""Deepstack and positions; neither. The whole stack runs Qwen2.5-VL."""


@dataclass
class TrtllmHalves:
    """Both halves of one model over the peer, and a cache between them."""

    model_dir: Path
    encoder: TrtllmVisionEncoder
    generator: TrtllmGenerator
    cache: MultimodalEmbeddingCacheManager = field(
        default_factory=lambda: MultimodalEmbeddingCacheManager(4 << 20)
    )

    def encode(self, image: Image.Image) -> EncodedItem:
        (result,) = self.encoder.encode([self.encoder.preprocess(EncodeItem(image))])
        assert isinstance(result, EncodedItem), result
        return result

    def lease(self, encoded: EncodedItem) -> Lease:
        """Put an embedding into the cache under its content's key, as the workers do, and hold it."""
        content = encoded.tensor.numpy().tobytes()
        key = embedding_key(content_digest(content), fingerprint=self.generator.fingerprint).hex
        return stored(self.cache, key, encoded)

    def carry(self, images: Sequence[Image.Image]) -> list[Lease]:
        return [self.lease(self.encode(image)) for image in images]

    @property
    def executor_pids(self) -> tuple[int, int]:
        """Process ids of the vision and of the language executor."""
        return self.encoder._encoder._executor.process.pid, self.generator._llm._executor.process.pid


@pytest.fixture(scope="session")
def peer() -> Iterator[Any]:
    """The peer as `tensorrt_llm`, and nothing of it left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEER))
        import tensorrt_llm

        yield tensorrt_llm
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def trtllm_of(peer: Any, model_of: ModelFactory) -> Iterator[Callable[[str], TrtllmHalves]]:
    """Both halves of an architecture; all four processes start at once, at the first use."""
    loaded: dict[str, TrtllmHalves] = {}
    args = TrtllmLlmArgs(guided_decoding_backend="xgrammar")

    def load_all() -> None:
        with ThreadPoolExecutor() as threads:
            encoders = {
                name: threads.submit(TrtllmVisionEncoder, model_of(name), TrtllmEncoderArgs())
                for name in SERVED
            }
            generators = {name: threads.submit(TrtllmGenerator, model_of(name), args) for name in SERVED}
        for name in SERVED:
            loaded[name] = TrtllmHalves(model_of(name), encoders[name].result(), generators[name].result())

    def load(architecture: str) -> TrtllmHalves:
        if not loaded:
            load_all()
        return loaded[architecture]

    yield load
    with ThreadPoolExecutor() as threads:
        for halves in loaded.values():
            threads.submit(halves.encoder.close)
            threads.submit(asyncio.run, halves.generator.close())
    for halves in loaded.values():
        halves.cache.check_integrity()


@pytest.fixture(params=SERVED)
def trtllm(request: pytest.FixtureRequest, trtllm_of: Callable[[str], TrtllmHalves]) -> TrtllmHalves:
    """Both halves of each architecture in turn."""
    return trtllm_of(request.param)


@pytest.fixture
def qwen(trtllm_of: Callable[[str], TrtllmHalves]) -> TrtllmHalves:
    return trtllm_of("qwen3_vl")


@pytest.fixture
def llava(trtllm_of: Callable[[str], TrtllmHalves]) -> TrtllmHalves:
    return trtllm_of("llava_next")
