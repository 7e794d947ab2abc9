"""One request at a PD worker: its images are resolved, then the model's tokens streamed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from dynamo.runtime import Context
from opentelemetry.trace import SpanKind

from trtllm_mm_cache.engines.base import Generator, TokenDelta
from trtllm_mm_cache.errors import MmCacheError, OverloadedError
from trtllm_mm_cache.observability.logs import request_id
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.pd.answer_record import AnswerRecord
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.request import PdRequest, parse_request
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.pd.resolved_images import ResolvedItems
from trtllm_mm_cache.runtime.admission import Admission, AdmissionStatistics
from trtllm_mm_cache.runtime.connect import RequestStoppedError, stream_until_stopped, until_stopped
from trtllm_mm_cache.runtime.detached import detached
from trtllm_mm_cache.runtime.faults import as_dynamo_error
from trtllm_mm_cache.settings import PdSettings


class PdWorker:
    """Answers generation requests of Dynamo's frontend. For use from one event loop."""

    def __init__(
        self, generator: Generator, resolver: ItemResolver, metrics: PdMetrics, settings: PdSettings
    ) -> None:
        self._generator = generator
        self._resolver = resolver
        self._metrics = metrics
        self._max_images = settings.max_images_per_request
        self._running = Admission(
            max_items=settings.max_concurrent_requests,
            max_bytes=sys.maxsize,
            refusal=lambda: OverloadedError(
                f"{settings.max_concurrent_requests} requests are under way already; retry in a moment"
            ),
        )

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        """Stream the answer to one request, in the form Dynamo's frontend expects of a worker."""
        async for output in detached(self._answer(payload, context)):
            yield output

    async def _answer(self, payload: Any, context: Context) -> AsyncGenerator[dict[str, Any]]:
        request_id.set(context.id())
        parent = remote_parent(context.trace_headers())
        with span("request", parent=parent, kind=SpanKind.SERVER) as current:
            record = AnswerRecord(context.id(), self._metrics, current)
            try:
                with self._running.admitted():
                    async with aclosing(self._serve(payload, context, record)) as outputs:
                        async for output in outputs:
                            yield output
            except RequestStoppedError:
                record.left()
            except (GeneratorExit, asyncio.CancelledError):
                record.left()
                raise
            except MmCacheError as error:
                record.ended("failed", error)
                raise as_dynamo_error(error) from error
            except Exception as error:
                # An engine may raise anything; its text may hold paths and addresses: for the log alone.
                failure = MmCacheError("the engine failed on this request")
                failure.__cause__ = error
                record.ended("failed", failure)
                raise as_dynamo_error(failure) from error
            else:
                record.ended("served")

    async def _serve(
        self, payload: Any, context: Context, record: AnswerRecord
    ) -> AsyncGenerator[dict[str, Any]]:
        with span("references"):
            request = parse_request(payload, context.id(), max_images=self._max_images)
        images: ResolvedItems = await until_stopped(context, self._resolve(request))
        try:
            record.resolved(images)
            with span("generate"):
                async with aclosing(self._generate(request, images, context, record)) as outputs:
                    async for output in outputs:
                        yield output
        finally:
            images.release()

    def running(self) -> AdmissionStatistics:
        """Count the requests that are under way."""
        return self._running.statistics()

    async def close(self) -> None:
        """Stop flights and generation, free the model."""
        await self._resolver.close()
        await self._generator.close()

    async def _resolve(self, request: PdRequest) -> ResolvedItems:
        return await self._resolver.resolve(
            request.references,
            processor_kwargs=request.processor_kwargs,
            salt=request.generation.cache_salt,
            variant=self._generator.variant(len(request.references)),
        )

    async def _generate(
        self, request: PdRequest, images: ResolvedItems, context: Context, record: AnswerRecord
    ) -> AsyncGenerator[dict[str, Any]]:
        """Step 8: generate; the leases are held until the engine is done with them."""
        count = 0
        tokens = self._generator.generate(request.generation, images.leases)
        async with aclosing(stream_until_stopped(context, tokens)) as deltas:
            async for delta in deltas:
                count += len(delta.token_ids)
                record.generated(len(delta.token_ids), finished=delta.finish_reason is not None)
                yield _output(delta, count)


def _output(delta: TokenDelta, completion_tokens: int) -> dict[str, Any]:
    # With every delta: the frontend ends an answer by itself at the end token and looks no further.
    output: dict[str, Any] = {
        "token_ids": list(delta.token_ids),
        "completion_usage": {
            "prompt_tokens": delta.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": delta.prompt_tokens + completion_tokens,
        },
    }
    if delta.finish_reason is not None:
        output["finish_reason"] = delta.finish_reason
    return output
