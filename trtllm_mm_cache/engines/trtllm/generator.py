"""The PD side: prompts and embeddings to tokens with TensorRT-LLM's `LLM`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import (
    FinishReason,
    GenerationRequest,
    ItemDescription,
    LeasedEmbedding,
    PlaceLogprobs,
    TokenDelta,
)
from trtllm_mm_cache.engines.checks import fit_for_client, grid_of
from trtllm_mm_cache.engines.fingerprint import model_fingerprint
from trtllm_mm_cache.engines.leaving import EndingRequests
from trtllm_mm_cache.engines.trtllm.handles import PositionBufferPool
from trtllm_mm_cache.engines.trtllm.layout import ModelLayout, embedding_dtype_name
from trtllm_mm_cache.engines.trtllm.logprobs import places_of
from trtllm_mm_cache.engines.trtllm.prepare import PreparedRequest, RequestPreparer
from trtllm_mm_cache.engines.trtllm.prompt import PromptReader
from trtllm_mm_cache.engines.trtllm.settings import TrtllmLlmArgs
from trtllm_mm_cache.engines.trtllm.support import (
    architecture_of,
    check_ranks,
    import_tensorrt_llm,
    shut_down_on_failure,
    start_engine,
)
from trtllm_mm_cache.errors import ConfigurationError, GenerationError, InvalidRequestError
from trtllm_mm_cache.threads import in_thread

logger = logging.getLogger(__name__)


_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "cancelled": "cancelled"}


class TrtllmGenerator:
    """`Generator` over `LLM.generate_async`, with embeddings handed over as handles into the arena.

    The engine schedules requests itself; they run together. For use from one event loop.
    """

    def __init__(self, model_path: Path, args: TrtllmLlmArgs) -> None:
        """Load the model. Blocking: minutes. Raises `ConfigurationError`."""
        architecture = architecture_of(model_path)
        check_ranks(args.tensor_parallel_size, args.pipeline_parallel_size)
        tensorrt_llm = import_tensorrt_llm()
        from tensorrt_llm.executor.utils import RequestError

        self._refusals = (ValueError, NotImplementedError, RequestError)
        self._failures = (RuntimeError, ValueError, AssertionError, RequestError)
        self._buffers = PositionBufferPool()
        self._ending = EndingRequests()
        self._llm: Any = start_engine(tensorrt_llm.LLM, model_path, args.given())
        with shut_down_on_failure(self._llm):
            config = self._checked_processor().config
            self._fingerprint = model_fingerprint(
                model_path,
                engine=f"tensorrt_llm {tensorrt_llm.__version__}",
                embedding_dtype=embedding_dtype_name(config, args.dtype),
            )
            layout = ModelLayout.of(config)
            layout = replace(layout, context=min(layout.context, args.max_seq_len or layout.context))
            self._layout = layout
            self._has_mrope = architecture.has_mrope
            self._prepare = RequestPreparer(
                tensorrt_llm=tensorrt_llm,
                architecture=architecture,
                layout=layout,
                reader=PromptReader(self._llm.input_processor.tokenizer, layout.placeholder_ids),
                buffers=self._buffers,
                openers=args.tensor_parallel_size * args.pipeline_parallel_size,
                guide=args.guided_decoding_backend,
            )
        logger.info(
            "embeddings reach the engine by handle, keyed by their content; KV block reuse is %s",
            "on" if args.enable_block_reuse else "off",
        )

    def _checked_processor(self) -> Any:
        processor = self._llm.input_processor
        if not getattr(processor, "support_mm_disagg", False):
            raise ConfigurationError(
                "this release of TensorRT-LLM does not take embeddings by handle for this model, and the "
                "other way to hand them over could mix up images in its KV cache"
            )
        return processor

    @property
    def fingerprint(self) -> str:
        """See `Generator.fingerprint`."""
        return self._fingerprint

    async def load_adapters(self) -> tuple[str, ...]:
        """See `Generator.load_adapters`: TensorRT-LLM serves none here."""
        return ()

    def variant(self, image_count: int) -> str:
        """Return "": the engine encodes every image alone, so its neighbours make no difference."""
        del image_count
        return ""

    def check_embedding(
        self, item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
    ) -> None:
        """See `Generator.check_embedding`; how many rows an item's size comes to, the engine alone knows."""
        del item
        self._layout.check(shape, dtype)
        if self._has_mrope:
            grid_of(metadata, shape[0], self._layout.merge_size)

    async def generate(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream tokens; see `Generator.generate`.

        The leases are held by clones of this generator's own until the engine has finished with the
        request, also when the answer is cancelled: closing the iterator aborts the request and waits for its
        end, at most 10 seconds; what then still runs keeps its leases in the background.
        Raises `GenerationError` when the engine fails.
        """
        prepared = await in_thread(lambda: self._prepare(request, leases), undo=self._release)
        result: Any = None
        sent, likeliest = 0, request.sampling.logprobs
        try:
            result = self._submit(prepared)
            async with contextlib.aclosing(self._outputs(result)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    tokens = tuple(completion.token_ids[sent:])
                    logprobs: tuple[PlaceLogprobs, ...] = ()
                    if likeliest is not None:
                        logprobs = places_of(tokens, completion.logprobs[sent:], likeliest)
                    sent += len(tokens)
                    finish_reason = _finish_reason(completion.finish_reason) if output.finished else None
                    if tokens or finish_reason is not None:
                        yield TokenDelta(tokens, prepared.prompt_tokens, finish_reason, logprobs)
        finally:
            await self._end(result, prepared)

    async def failed(self) -> None:
        """Never return: TensorRT-LLM does not say that its executor ended, requests fail then."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Abort what runs, stop the engine and free the model."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
        await self._ending.close()
        self._buffers.close()

    def _submit(self, prepared: PreparedRequest) -> Any:
        """Hand the request to the engine; from the event loop, where its result finds the loop it wakes.

        The engine tokenises the text here, so this costs about what the tokenizer does.
        """
        if self._llm is None:
            raise GenerationError("the engine has been shut down; retry on another worker")
        try:
            return self._llm.generate_async(**prepared.arguments)
        except self._refusals as error:
            reason = fit_for_client(error, "its parameters or its length do not fit the engine")
            raise InvalidRequestError(f"TensorRT-LLM refuses the request: {reason}") from error
        except (RuntimeError, AssertionError) as error:
            raise GenerationError("TensorRT-LLM could not take the request; see the log") from error

    async def _outputs(self, result: Any) -> AsyncGenerator[Any, None]:
        try:
            async for output in result:
                yield output
        except self._failures as error:
            raise GenerationError("TensorRT-LLM failed on the request; see the log") from error

    async def _end(self, result: Any, prepared: PreparedRequest) -> None:
        """Release what the handles point into, once the engine does not read it any more."""
        if result is None or result.finished:
            self._release(prepared)
            return
        result.abort()
        await self._ending.end(self._drain(result, prepared))

    async def _drain(self, result: Any, prepared: PreparedRequest) -> None:
        try:
            async for _ in result:
                pass
        except self._failures as error:
            logger.info("an aborted request ended with %s", type(error).__name__, exc_info=error)
        finally:
            self._release(prepared)

    def _release(self, prepared: PreparedRequest) -> None:
        for lease in prepared.leases:
            lease.release()
        if prepared.positions is not None:
            self._buffers.release(prepared.positions)


def _finish_reason(reason: str | None) -> FinishReason:
    if reason in _FINISH_REASONS:
        return _FINISH_REASONS[reason]
    raise GenerationError(f"TensorRT-LLM ended the answer without a reason that is known ({reason})")
