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
from trtllm_mm_cache.engines.sglang.answers import Answers, Output, engine_lost
from trtllm_mm_cache.engines.sglang.outputs import delta_of
from trtllm_mm_cache.engines.sglang.prepare import PreparedRequest, RequestPreparer
from trtllm_mm_cache.engines.sglang.processes import RunningEngine
from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
from trtllm_mm_cache.engines.sglang.support import check_architecture
from trtllm_mm_cache.errors import GenerationError, InvalidRequestError, MmCacheError

logger = logging.getLogger(__name__)

_ABORT_WAIT_S = 10.0


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
        self._check = EmbeddingCheck(architecture, layout, expander)
        self._ending: set[asyncio.Task[None]] = set()
        engine = RunningEngine(model_path, args)
        loaded = engine.manager.model_config
        place = PromptPlacer(architecture, layout, expander, engine.context, loaded.vocab_size)
        self._prepare = RequestPreparer(place, engine.inputs, args.enable_deterministic_inference)
        self._engine: RunningEngine | None = engine

    @property
    def fingerprint(self) -> str:
        """See `Generator.fingerprint`: that of the transformers tower whose embeddings SGLang gets."""
        return self._fingerprint

    def variant(self, image_count: int) -> str:
        """Return "": no architecture that is served here encodes an image otherwise beside others."""
        del image_count
        return ""

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
        prepared = await self._prepared(request, leases)
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
        for ending in tuple(self._ending):
            ending.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _prepared(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> PreparedRequest:
        preparing = asyncio.get_running_loop().run_in_executor(None, self._prepare, request, leases)
        try:
            return await asyncio.shield(preparing)
        except asyncio.CancelledError:
            # The thread cannot be stopped; what it makes has no taker any more.
            preparing.add_done_callback(_release_unused)
            raise
        finally:
            # An error's traceback leads to this frame, and the future to the error: a circle would keep the
            # views that the frames above hold, and with them the cache's entries.
            del preparing

    async def _end(self, answers: Answers, prepared: PreparedRequest) -> None:
        """Release what the handles point into, once no scheduler reads it any more."""
        if answers.ended:
            prepared.release()
            return
        answers.abort()
        ending = asyncio.create_task(_release_at_the_end(answers, prepared), name="aborted request")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        _, running = await asyncio.wait({ending}, timeout=_ABORT_WAIT_S)
        if running:
            logger.warning(
                "an aborted request has not ended within %g s; its embeddings stay leased until it does",
                _ABORT_WAIT_S,
            )


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


def _release_unused(preparing: asyncio.Future[PreparedRequest]) -> None:
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().release()
