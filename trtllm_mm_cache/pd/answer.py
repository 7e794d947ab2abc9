"""One request at a PD worker: its items are resolved, then step 8: the engine's tokens are streamed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any

from opentelemetry.trace import SpanKind

from trtllm_mm_cache.engines.base import Generator, PlaceLogprobs, TokenDelta
from trtllm_mm_cache.errors import MmCacheError, OverloadedError
from trtllm_mm_cache.observability.logs import request_id
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.prompt_logprobs import PromptLogprobsLimit, messages_of
from trtllm_mm_cache.pd.record import AnswerRecord
from trtllm_mm_cache.pd.request import parse_request
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.admission import Admission
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.faults import as_dynamo_message
from trtllm_mm_cache.runtime.generation import FrontendMark, error_message, heartbeats
from trtllm_mm_cache.runtime.streaming import (
    Emit,
    RequestContext,
    RequestStoppedError,
    detached,
    stopped_with,
)
from trtllm_mm_cache.settings import PdSettings

Output = dict[str, Any]
"""One message to Dynamo's frontend, in the form it expects of a worker."""


Admit = Callable[[Any], Output]
"""Takes the caller's proof off a request, and returns what the answer's first message is in return; raises
`NotAMemberError`. See `runtime.membership.Membership.admit`."""


class PdWorker:
    """Answers generation requests of Dynamo's frontend. For use from one event loop."""

    def __init__(
        self,
        generator: Generator,
        resolver: ItemResolver,
        metrics: PdMetrics,
        settings: PdSettings,
        admit: Admit,
        adapters: Collection[str] = (),
    ) -> None:
        """`adapters` are those that the generator has loaded."""
        self._admit = admit
        self._adapters = adapters
        self._generator = generator
        self._resolver = resolver
        self._metrics = metrics
        self._max_images = settings.max_images_per_request
        self._running = Admission(
            what="request",
            max_items=settings.max_concurrent_requests,
            max_bytes=sys.maxsize,
            refusal=lambda: OverloadedError(
                f"{settings.max_concurrent_requests} requests are under way already; retry in a moment"
            ),
        )
        self._prompt_logprobs = PromptLogprobsLimit(settings.max_prompt_logprobs)
        for admission in (self._running, self._prompt_logprobs.admission):
            metrics.registry.register(admission)

    def handle(self, payload: Any, context: RequestContext) -> AsyncGenerator[Output]:
        """Stream the answer to one request."""
        return detached(partial(self._answer, payload, context))

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop embeddings; see `ItemResolver.drop`."""
        return await self._resolver.drop(request)

    async def close(self) -> None:
        """Stop flights and generation, free the model."""
        await self._resolver.close()
        await self._generator.close()

    async def _answer(self, payload: Any, context: RequestContext, emit: Emit[Output]) -> None:
        """Emit the answer or what Dynamo's frontend is to be told instead, and record how it ended."""
        name = context.id() or ""
        request_id.set(name)
        mark = FrontendMark.of(payload)
        parent = remote_parent(context.trace_headers() if mark is None else mark.trace_headers)
        with span("request", parent=parent, kind=SpanKind.SERVER) as current:
            record = AnswerRecord(name, self._metrics, current)
            try:
                if proof := self._admit(payload):
                    emit(proof)
                with self._running.admitted(), nullcontext() if mark is None else heartbeats(emit):
                    async with stopped_with(context):
                        await self._serve(payload, name, record, emit)
            except RequestStoppedError:
                record.stopped()
            except asyncio.CancelledError:
                record.stopped()
                raise
            except MmCacheError as error:
                record.ended("failed", error)
                emit(_failure(error, mark))
            except Exception as error:  # noqa: BLE001 - it is sent as an error of ours
                # An engine may raise anything; its text may hold paths and addresses: for the log alone.
                emit(_failure(_engine_failure(record, error), mark))
            else:
                record.ended("served")

    async def _serve(self, payload: Any, name: str, record: AnswerRecord, emit: Emit[Output]) -> None:
        with span("references"):
            request = parse_request(payload, name, max_images=self._max_images, adapters=self._adapters)
        marked = FrontendMark.of(payload) is not None
        variant = self._generator.variant(len(request.references))
        items = await self._resolver.resolve(request, variant=variant)
        try:
            record.resolved(items)
            if marked:
                counts = {"hits": items.hits, "misses": items.misses, "hit_rows": items.hit_rows}
                emit({"items": counts})
            sampling = request.generation.sampling
            prompt_tokens = len(request.generation.token_ids) + items.rows - len(items.leases)
            with self._prompt_logprobs.admitted(sampling, prompt_tokens), span("generate"):
                # The leases are held until the engine is done with them: until its iterator is closed.
                unfinished = sampling.choices
                async with aclosing(self._generator.generate(request.generation, items.leases)) as deltas:
                    async for delta in deltas:
                        unfinished -= delta.finish_reason is not None
                        record.generated(len(delta.token_ids), finished=unfinished == 0)
                        if delta.prompt_logprobs is not None:
                            for message in await messages_of(delta.prompt_logprobs, in_pieces=marked):
                                emit(message)
                        emit(_output(delta, record.tokens))
                        items.first_token()
        finally:
            items.release()


def _engine_failure(record: AnswerRecord, error: Exception) -> MmCacheError:
    failure = MmCacheError("the engine failed on this request")
    failure.__cause__ = error
    record.ended("failed", failure)
    failure.__cause__ = None  # logged; it would keep the request's bytes
    return failure


def _failure(error: MmCacheError, mark: FrontendMark | None) -> Output:
    """Return the last message of an answer that failed, for our frontend or for Dynamo's own."""
    return as_dynamo_message(error) if mark is None else error_message(error)


def _output(delta: TokenDelta, completion_tokens: int) -> Output:
    # With every delta: the frontend ends an answer by itself at the end token and looks no further.
    usage: dict[str, Any] = {
        "prompt_tokens": delta.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": delta.prompt_tokens + completion_tokens,
    }
    if delta.cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": delta.cached_tokens}
    output: Output = {"token_ids": list(delta.token_ids), "index": delta.choice, "completion_usage": usage}
    if delta.logprobs:
        output |= _logprobs(delta.logprobs)
    if delta.finish_reason is not None:
        output["finish_reason"] = delta.finish_reason
    return output


def _logprobs(places: Sequence[PlaceLogprobs]) -> Output:
    """Return one entry a token, in the form of Dynamo's workers."""
    output: Output = {"log_probs": [place.chosen.logprob for place in places]}
    if places[0].likeliest:
        output["top_logprobs"] = [
            [
                {"rank": rank, "token_id": token.token_id, "logprob": token.logprob}
                for rank, token in enumerate(place.likeliest, start=1)
            ]
            for place in places
        ]
    return output
