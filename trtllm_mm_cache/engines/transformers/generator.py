"""The PD side: prompts and embeddings to tokens with the model's language half."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import (
    FinishReason,
    GenerationRequest,
    ItemDescription,
    LeasedEmbedding,
    SamplingParams,
    TokenDelta,
)
from trtllm_mm_cache.engines.huggingface.embedding_check import EmbeddingCheck
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import load_processor, read_config
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.transformers.constraint import ConstraintCompiler
from trtllm_mm_cache.engines.transformers.features import encoder_output
from trtllm_mm_cache.engines.transformers.leader import Alone, Ranks
from trtllm_mm_cache.engines.transformers.loading import fingerprint_of, load_text_half
from trtllm_mm_cache.engines.transformers.lockstep import Limits
from trtllm_mm_cache.engines.transformers.prepare import PreparedRequest, RequestPreparer
from trtllm_mm_cache.engines.transformers.sampling import (
    ModelsLogprobs,
    logits_processors,
    min_tokens_processor,
)
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.engines.transformers.streaming import AnswerEnd, Token, TokenStream
from trtllm_mm_cache.errors import IntegrityError


class TransformersGenerator:
    """`Generator` over Hugging Face's `generate(..., mm_encoder_outputs=...)`.

    One request computes at a time, in a thread of its own; the others wait in order and cost nothing
    meanwhile. The vision tower is never loaded. With several ranks this is rank 0, and each request
    computes on all of them; `ranks` belongs to the generator from then on.
    """

    def __init__(self, model_path: Path, args: TransformersEngineArgs, ranks: Ranks | None = None) -> None:
        """Load the language half. Blocking. Raises `ConfigurationError`."""
        self._ranks = ranks or Alone()
        try:
            self._load(model_path, args)
            self._ranks.wait_loaded()
        except BaseException:
            self._ranks.dismiss()
            raise
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._streams: set[TokenStream] = set()
        self._closed = False

    def _load(self, model_path: Path, args: TransformersEngineArgs) -> None:
        config, self._architecture = read_config(model_path)
        self._fingerprint = fingerprint_of(model_path, args)
        processor = load_processor(model_path, config)
        self._tokenizer = processor.tokenizer
        self._model: Any = load_text_half(
            model_path, config, self._architecture, args, ranks=self._ranks.size
        )
        text_config = config.get_text_config()
        layout = FeatureLayout.of(config, self._architecture, args.resolved_embedding_dtype())
        expander = PromptExpander(processor, config)
        self._layout = layout
        self._check = EmbeddingCheck(self._architecture, layout, expander)
        self._prepare = RequestPreparer(
            architecture=self._architecture,
            layout=layout,
            expander=expander,
            context=min(text_config.max_position_embeddings, args.max_model_len or sys.maxsize),
            vocabulary=self._model.get_input_embeddings().num_embeddings,
            device=args.resolved_device(),
            share=self._ranks.share,
        )
        self._eos_token_ids = _as_tuple(
            self._model.generation_config.eos_token_id or text_config.eos_token_id
        )
        self._constrain = ConstraintCompiler(self._tokenizer, self._eos_token_ids)
        # generate() fills every value that a request leaves open from here: released models bring
        # sampling defaults of their own, but what an omitted field means is the API's to say.
        self._model.generation_config = GenerationConfig()

    @property
    def fingerprint(self) -> str:
        """See `Generator.fingerprint`."""
        return self._fingerprint

    async def load_adapters(self) -> tuple[str, ...]:
        """See `Generator.load_adapters`: this engine serves none here."""
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

        The token that ends an answer (end of sequence, stop token, last of a stop string) is among
        the tokens. More `max_tokens` than the context has room for are cut to what fits.
        Raises `InvalidRequestError` for sampling values and for a prompt that fills the context.

        Closing the iterator, or cancelling the task that reads it, stops the computation at its next
        token and returns when it has stopped, at most one forward pass later. A second cancellation
        does not wait for that; the computation's views keep the embeddings in place until it ends.
        """
        if self._closed:
            raise IntegrityError("a request came to a generator that is closed")
        stream = TokenStream()
        self._streams.add(stream)
        try:
            prepared = await asyncio.to_thread(self._prepared, request, leases)
            if stream.cancelled:  # the generator was closed meanwhile
                yield TokenDelta((), prepared.prompt_tokens, "cancelled")
                return
            work = self._executor.submit(self._compute, prepared, stream)
            work.add_done_callback(stream.end)
            try:
                finish_reason: FinishReason | None = None
                while finish_reason is None:
                    tokens, finish_reason = await stream.next()
                    yield _delta(tokens, prepared.prompt_tokens, finish_reason)
            finally:
                stream.cancel()
                if not work.cancel():
                    await stream.wait_ended()
        finally:
            self._streams.discard(stream)

    def prefill_logits(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> torch.Tensor:
        """Return `[vocabulary]` float32 on the CPU: the logits of the first token after the prompt.

        For verification and evaluation: it is what `generate` starts from, bit for bit, and no key or
        value is kept. Blocking; takes its turn among the requests. Raises like `generate`.
        """
        prepared = self._prepare(replace(request, sampling=SamplingParams(max_tokens=1)), leases)
        return self._executor.submit(self._first_logits, prepared).result()

    async def failed(self) -> None:
        """Never return: the model computes in this process."""
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Cancel what runs and what waits, and free the model once the thread has left it."""
        self._closed = True
        for stream in self._streams:
            stream.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._executor.shutdown)
        await asyncio.to_thread(self._ranks.close)
        self._model = None

    def _prepared(self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]) -> PreparedRequest:
        return replace(self._prepare(request, leases), constraint=self._constrain(request.sampling))

    def _compute(self, prepared: PreparedRequest, stream: TokenStream) -> FinishReason:
        """Run in the computing thread: emit tokens into `stream` and return why they ended."""
        if stream.cancelled:
            return "cancelled"
        sampling = prepared.sampling
        eos_token_ids = () if sampling.ignore_eos else self._eos_token_ids
        stop_token_ids = [*eos_token_ids, *sampling.stop_token_ids]
        noted = None if sampling.logprobs is None else ModelsLogprobs(sampling.logprobs)
        end = AnswerEnd(prepared, stop_token_ids, self._tokenizer, stream, noted)
        limits = Limits(prepared.max_new_tokens, tuple(stop_token_ids))
        min_tokens = min_tokens_processor(
            min(sampling.min_tokens, prepared.max_new_tokens),
            prepared.prompt_tokens,
            stop_token_ids,
            self._model.device,
        )
        first = filter(None, (noted, prepared.constraint, min_tokens))
        with self._ranks.computing(prepared.inputs, prepared.handles, limits):
            self._model.generate(
                **self._inputs(prepared),
                generation_config=limits.generation_config(),
                logits_processor=LogitsProcessorList([*first, *logits_processors(sampling)]),
                stopping_criteria=self._ranks.criteria(end),
            )
        if prepared.constraint is not None:
            prepared.constraint.check()
        return end.reason

    def _inputs(self, prepared: PreparedRequest) -> dict[str, Any]:
        """Return the inputs, with the embeddings where the model is; not before the request's turn."""
        if not prepared.embeddings:
            return dict(prepared.inputs)
        output = encoder_output(self._layout, prepared.embeddings, self._model.device)
        return {**prepared.inputs, "mm_encoder_outputs": {"image": output}}

    def _first_logits(self, prepared: PreparedRequest) -> torch.Tensor:
        limits = Limits(max_new_tokens=1)
        with self._ranks.computing(prepared.inputs, prepared.handles, limits):
            output = self._model.generate(
                **self._inputs(prepared),
                generation_config=limits.generation_config(output_logits=True, return_dict_in_generate=True),
                stopping_criteria=self._ranks.criteria(),
            )
        logits: torch.Tensor = output.logits[0][0]
        return logits.float().cpu()


def _delta(tokens: Sequence[Token], prompt_tokens: int, finish_reason: FinishReason | None) -> TokenDelta:
    logprobs = tuple(places for _, places in tokens if places is not None)
    return TokenDelta(tuple(token for token, _ in tokens), prompt_tokens, finish_reason, logprobs)


def _as_tuple(token_ids: int | list[int] | None) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    return (token_ids,) if isinstance(token_ids, int) else tuple(token_ids)
