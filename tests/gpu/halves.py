"""Both halves over the real TensorRT-LLM, a cache between them, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tests.engines.conftest import stored
from tests.engines.contract import Case
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.trtllm import (
    TrtllmEncoderArgs,
    TrtllmGenerator,
    TrtllmLlmArgs,
    TrtllmVisionEncoder,
)

# As upstream's test: batches of one and no shared KV blocks, so that outputs can be equal to the last bit.
ENCODER = {"max_batch_size": 1}
LLM = {
    "max_batch_size": 1,
    "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.2},
}


@dataclass(frozen=True)
class Output:
    """What upstream's test compares."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass
class GpuHalves:
    """One model on one GPU."""

    model_dir: Path
    generator: TrtllmGenerator
    encoder: TrtllmVisionEncoder
    cache: MultimodalEmbeddingCacheManager = field(
        default_factory=lambda: MultimodalEmbeddingCacheManager(1 << 30)
    )

    @classmethod
    def load(cls, model_dir: Path, **llm: Any) -> GpuHalves:
        """Load the language half first: its KV cache takes a share of what is free."""
        generator = TrtllmGenerator(model_dir, TrtllmLlmArgs.model_validate(LLM | llm))
        return cls(model_dir, generator, TrtllmVisionEncoder(model_dir, TrtllmEncoderArgs(**ENCODER)))

    @property
    def llm(self) -> Any:
        """The real `LLM`."""
        return self.generator._llm

    def carry(self, images: Sequence[Image.Image]) -> list[Lease]:
        """Encode one by one, through the cache."""
        return [self._lease(image) for image in images]

    def _lease(self, image: Image.Image) -> Lease:
        (encoded,) = self.encoder.encode([self.encoder.preprocess(EncodeItem(image))])
        assert isinstance(encoded, EncodedItem), encoded
        key = embedding_key(content_digest(image.tobytes()), fingerprint=self.generator.fingerprint).hex
        return stored(self.cache, key, encoded)

    def by_handle(self, case: Case, leases: Sequence[Lease], max_tokens: int = 64) -> Output:
        """Generate as the adapter does, with log-probabilities and text besides."""
        prepared = self.generator._prepare(
            replace(case.request, sampling=replace(case.request.sampling, max_tokens=max_tokens)), leases
        )
        arguments = dict(prepared.arguments) | {"streaming": False}
        arguments["sampling_params"].logprobs = 1
        arguments["sampling_params"].detokenize = True
        try:
            return output_of(self.llm.generate_async(**arguments).result())
        finally:
            self.generator._release(prepared)

    def whole(self, case: Case, max_tokens: int = 64) -> Output:
        """Generate as TensorRT-LLM does by itself, with its own vision tower in the same engine."""
        from tensorrt_llm import SamplingParams

        inputs = {"prompt": case.prompt, "multi_modal_data": {"image": list(case.images)}}
        sampling = SamplingParams(max_tokens=max_tokens, top_k=1, logprobs=1)
        return output_of(self.llm.generate_async(inputs, sampling_params=sampling).result())

    def close(self) -> None:
        """Free both engines."""
        self.encoder.close()
        self.llm.shutdown()
        self.cache.close()


def output_of(result: Any) -> Output:
    """Read a finished result."""
    output = result.outputs[0]
    chosen = (
        step[token].logprob if isinstance(step, dict) else step
        for step, token in zip(output.logprobs, output.token_ids, strict=True)
    )
    return Output(output.text, tuple(output.token_ids), tuple(float(value) for value in chosen))
