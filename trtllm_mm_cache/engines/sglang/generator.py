"""The PD side: prompts and embeddings to tokens with SGLang's in-process `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import torch

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import GenerationRequest, ItemDescription, LeasedEmbedding, TokenDelta
from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.engines.huggingface.embedding_check import EmbeddingCheck
from trtllm_mm_cache.engines.huggingface.expanded import PromptPlacer
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import load_processor, read_config
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.leaving import EndingRequests
from trtllm_mm_cache.engines.sglang.answers import Answers, Output, engine_lost
from trtllm_mm_cache.engines.sglang.outputs import delta_of
from trtllm_mm_cache.engines.sglang.prepare import PreparedRequest, RequestPreparer
from trtllm_mm_cache.engines.sglang.processes import RunningEngine
from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
from trtllm_mm_cache.engines.sglang.support import check_architecture
from trtllm_mm_cache.errors import GenerationError, InvalidRequestError, MmCacheError
from trtllm_mm_cache.threads import in_thread

logger = logging.getLogger(__name__)


class SglangGenerator:
    """`Generator` over SGLang's `Engine`, with embeddings handed over by their place in the arena.

    SGLang schedules requests itself; they run together. For use from one event loop.
    """

    def __init__(self, model_path: Path, args: SglangEngineArgs) -> None:
        """Load the model. Blocking: half a minute and more. Raises `ConfigurationError`."""
        config, architecture = read_config(model_path)
        check_architecture(config.model_type)
        self._fingerprint = args.fingerprint(model_path)
        layout = FeatureLayout.of(config, architecture, getattr(torch, args.resolved_dtype(model_path)))
        expander = PromptExpander(load_processor(model_path, config), config)
        self._architecture = architecture
        self._check = EmbeddingCheck(architecture, layout, expander)
        self._ending = EndingRequests()
        engine = RunningEngine(model_path, config.model_type, args)
        loaded = engine.manager.model_config
        place = PromptPlacer(architecture, layout, expander, engine.context, loaded.vocab_size)
        self._prepare = RequestPreparer(place, engine.inputs, args.enable_deterministic_inference)
        self._engine: RunningEngine | None = engine

    @property
    def fingerprint(self) -> str:
        """See `Generator.fingerprint`: that of the transformers tower whose embeddings SGLang gets."""
        return self._fingerprint

    async def load_adapters(self) -> tuple[str, ...]:
        """See `Generator.load_adapters`: SGLang serves none here."""
        return ()

    def variant(self, image_count: int) -> str:
        """See `Architecture.variant`."""
        return self._architecture.variant(image_count)

    def check_embedding(
        self, item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
    ) -> None:
        """See `Generator.check_embedding`."""
        self._check(item, shape, dtype, metadata)

    async def generate(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream tokens; see `Generator.generate`.

        The leases are held by clones of this generator's own until SGLang has reported the request's end.
        Closing the iterator aborts the request and waits for that, at most 10 seconds; what then still
        runs keeps its leases in the background. Raises `GenerationError` when the engine fails on the
        request, `EngineLostError` when its processes have ended.
        """
        prepared = await in_thread(lambda: self._prepare(request, leases), undo=PreparedRequest.release)
        if self._engine is None:
            prepared.release()
            raise engine_lost()
        answers = Answers(self._engine, prepared)
        try:
            async with contextlib.aclosing(_refused_by_name(answers)) as outputs:
                async for choice, output in outputs:
                    delta = delta_of(output, choice, request.sampling.logprobs)
                    if delta is not None:
                        yield delta
        finally:
            await self._end(answers, prepared)

    async def failed(self) -> None:
        """See `Generator.failed`: a scheduler or another process of SGLang's has ended."""
        if self._engine is not None:
            await self._engine.lost()
        raise engine_lost()

    async def close(self) -> None:
        """Abort what runs, stop the engine's processes and free the model."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
            await asyncio.to_thread(engine.close)
        await self._ending.close()

    async def _end(self, answers: Answers, prepared: PreparedRequest) -> None:
        """Release what the handles point into, once no scheduler reads it any more."""
        if answers.ended:
            prepared.release()
            return
        answers.abort()
        await self._ending.end(_release_at_the_end(answers, prepared))


async def _refused_by_name(answers: Answers) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield SGLang's outputs, and raise its errors as ours."""
    try:
        async with contextlib.aclosing(answers.outputs()) as outputs:
            async for output in outputs:
                yield output
    except MmCacheError:
        raise
    except ValueError as error:
        reason = fit_for_client(error, "its parameters or its length do not fit the engine")
        raise InvalidRequestError(f"SGLang refuses the request: {reason}") from error
    except Exception as error:
        raise GenerationError("SGLang failed on the request; see the log") from error


async def _release_at_the_end(answers: Answers, prepared: PreparedRequest) -> None:
    try:
        await answers.wait()
    finally:
        prepared.release()
