"""A request and its leases to the arguments of `LLM.generate_async`, with every check of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.engines.base import GenerationRequest, LeasedEmbedding
from trtllm_mm_cache.engines.checks import grid_of
from trtllm_mm_cache.engines.trtllm.handles import PositionBuffer, PositionBufferPool, cpu_handle
from trtllm_mm_cache.engines.trtllm.layout import ModelLayout
from trtllm_mm_cache.engines.trtllm.mrope import mrope_positions
from trtllm_mm_cache.engines.trtllm.prompt import PromptReader
from trtllm_mm_cache.engines.trtllm.sampling import engine_guide, engine_sampling
from trtllm_mm_cache.engines.trtllm.support import TrtllmArchitecture
from trtllm_mm_cache.errors import InvalidRequestError, PlaceholderMismatchError

REQUEST_TYPE = "context_and_generation"
"""Prefill and decode in one engine, on embeddings that were made elsewhere."""


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """`arguments` go to `LLM.generate_async` as they are, once.

    `leases` (clones) and `positions` are what the handles in it point into: they are to be released when the
    engine has finished with the request, and not before.
    """

    arguments: dict[str, Any]
    prompt_tokens: int
    leases: tuple[LeasedEmbedding, ...] = ()
    positions: PositionBuffer | None = None


@dataclass(frozen=True)
class RequestPreparer:
    """Thread-safe. `tensorrt_llm` is the imported package, `openers` the number of engine processes.

    `guide` is what the engine holds answers to a schema or pattern with, or None.
    """

    tensorrt_llm: Any
    architecture: TrtllmArchitecture
    layout: ModelLayout
    reader: PromptReader
    buffers: PositionBufferPool
    openers: int
    guide: str | None = None

    def __call__(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> PreparedRequest:
        """Check the request and describe it to the engine. No byte of an embedding is copied.

        Raises `InvalidRequestError`, `PlaceholderMismatchError` or `EmbeddingMismatchError`.
        """
        if not leases:
            inputs = {"prompt_token_ids": list(request.token_ids)}
            return PreparedRequest(
                self._arguments(request, inputs, len(request.token_ids)), len(request.token_ids)
            )
        limit = self.architecture.max_images
        if limit is not None and len(leases) > limit:
            raise PlaceholderMismatchError(
                f"{len(leases)} images in one prompt: TensorRT-LLM takes {limit} for this model"
            )
        prompt = self.reader.read(request, len(leases))
        rows = 0
        for index, lease in enumerate(leases):
            self.layout.check(lease.shape, lease.dtype, index)
            rows += lease.shape[0]
        prompt_tokens = len(prompt.token_ids) - len(leases) + rows
        arguments = self._arguments(request, {"prompt": prompt.text}, prompt_tokens)
        handed, positions = self._handles(prompt.token_ids, leases)
        return PreparedRequest(
            arguments | {"disaggregated_params": handed},
            prompt_tokens,
            tuple(lease.clone() for lease in leases),
            positions,
        )

    def _arguments(
        self, request: GenerationRequest, inputs: dict[str, Any], prompt_tokens: int
    ) -> dict[str, Any]:
        room = self.layout.context - prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {prompt_tokens} tokens with its images expanded; the context of "
                f"{self.layout.context} tokens has no room left for an answer"
            )
        sampling = engine_sampling(request.sampling, room)
        if guide := engine_guide(request.sampling, self.guide):
            sampling["guided_decoding"] = self.tensorrt_llm.llmapi.GuidedDecodingParams(**guide)
        return {
            "inputs": inputs,
            "sampling_params": self.tensorrt_llm.SamplingParams(**sampling),
            "streaming": True,
            "cache_salt": request.cache_salt,
        }

    def _handles(
        self, token_ids: list[int], leases: Sequence[LeasedEmbedding]
    ) -> tuple[Any, PositionBuffer | None]:
        """Return a new `DisaggregatedParams`, which serves one request only, and what it points into.

        The hashes are the embeddings' keys, so KV blocks are shared among equal contents and no others.
        """
        fields: dict[str, Any] = {
            "request_type": REQUEST_TYPE,
            "multimodal_hashes": [list(EmbeddingKey.from_hex(lease.key).int32s) for lease in leases],
        }
        positions: PositionBuffer | None = None
        if self.architecture.has_mrope:
            grids = [
                grid_of(lease.metadata, lease.shape[0], self.layout.merge_size, index)
                for index, lease in enumerate(leases)
            ]
            computed = mrope_positions(token_ids, self.layout.image_token_id, grids, self.layout.merge_size)
            positions = self.buffers.take(computed)
            position_ids, delta = positions.write(computed)
            fields["mrope_position_ids_handle"] = cpu_handle(Handle.of(position_ids, openers=self.openers))
            fields["mrope_position_deltas_handle"] = cpu_handle(Handle.of(delta, openers=self.openers))
        fields["multimodal_embedding_handles"] = [
            cpu_handle(lease.handle(openers=self.openers)) for lease in leases
        ]
        return self.tensorrt_llm.llmapi.DisaggregatedParams(**fields), positions
