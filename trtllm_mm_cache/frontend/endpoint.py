"""One endpoint over HTTP: from a POST request to its answer, its stream, or its error."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from typing import Any

from opentelemetry.trace import SpanKind
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.frontend.answer import Answer
from trtllm_mm_cache.frontend.apis import Api, Call
from trtllm_mm_cache.frontend.body import BodyMemory, BodyShare, announced_bytes, parse_body, receive_body
from trtllm_mm_cache.frontend.metrics import FrontendMetrics, ResponseRecord
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.prompt_logprobs import json_in_steps
from trtllm_mm_cache.frontend.responses import Reply
from trtllm_mm_cache.observability.logs import loggable_cause, request_id
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.runtime.admission import Admission
from trtllm_mm_cache.runtime.pd_client import PdWorkers
from trtllm_mm_cache.runtime.streaming import RequestStoppedError, stopped_with
from trtllm_mm_cache.settings import FrontendSettings

logger = logging.getLogger(__name__)


class Completions:
    """What the endpoints share, each of them an ASGI application. For use from one event loop."""

    def __init__(
        self,
        prompts: Prompts,
        workers: PdWorkers,
        memory: BodyMemory,
        metrics: FrontendMetrics,
        settings: FrontendSettings,
    ) -> None:
        self._prompts = prompts
        self._workers = workers
        self._memory = memory
        self._metrics = metrics
        self._settings = settings
        self._prompt_logprobs = Admission.of_prompt_logprobs()
        metrics.registry.register(self._prompt_logprobs)

    async def answer(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises nothing but a cancellation."""
        name = uuid.uuid4().hex
        request_id.set(name)
        record = ResponseRecord(name, self._metrics)
        request = Request(scope, receive)
        reply = Reply(send, {"x-request-id": name})
        try:
            with span("http_request", parent=remote_parent(request.headers), kind=SpanKind.SERVER):
                await self._serve(api, request, reply, record)
        except (ClientDisconnect, RequestStoppedError):
            logger.debug("the client of request %s has gone", name)
        except MmCacheError as error:
            await _fail(error, reply, record)
        except Exception:
            # Its text may hold what the client sent: for the log alone.
            logger.exception("request %s met a defect of the frontend", name)
            await _fail(MmCacheError("the frontend failed on this request"), reply, record)
        finally:
            record.ended()

    async def _serve(self, api: Api, request: Request, reply: Reply, record: ResponseRecord) -> None:
        async with self._memory.hold(announced_bytes(request, self._settings)) as share:
            raw = await receive_body(request, self._settings)
            async with stopped_with(_Client(request)):
                call = await api.read(await parse_body(raw))
                with self._prompt_logprobs.admitted() if call.prompt_logprobs else nullcontext():
                    await self._generate(api, call, share, reply, record)

    async def _generate(
        self, api: Api, call: Call, share: BodyShare, reply: Reply, record: ResponseRecord
    ) -> None:
        texts = [
            self._prompts.answer_text(
                call.prompt_tail, call.stop, skip_special_tokens=call.skip_special_tokens
            )
            for _ in range(call.choices)
        ]
        answer = Answer(record.request_id, call.model, texts, self._prompts.backend, logprobs=call.logprobs)
        form = api.form(answer)
        parts = []
        async with aclosing(self._messages(call, share, record.request_id)) as messages:
            async for delta in answer.deltas(messages):
                record.generated(answer.tokens)
                if not call.stream:
                    parts.append(delta)
                elif delta.text or delta.logprobs or delta.finish_reason or delta.is_new:
                    await reply.event(form.chunk(delta), items=answer.items)
        record.status = 200
        if call.stream:
            if call.stream_usage:
                await reply.event(form.usage_chunk())
            await reply.end()
        elif call.prompt_logprobs:
            body = await asyncio.to_thread(lambda: json_in_steps(form.whole(parts)))
            await reply.json(200, body, items=answer.items)
        else:
            await reply.json(200, form.whole(parts), items=answer.items)

    async def _messages(self, call: Call, share: BodyShare, name: str) -> AsyncGenerator[dict[str, Any]]:
        """Yield the worker's messages; with the first one the body's memory is free again."""
        async with aclosing(self._workers.generate(call.payload, name, call.items)) as messages:
            async for message in messages:
                share.release()
                yield message


class _Client:
    """The client of a request whose body is received, which may leave."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive

    async def async_killed_or_stopped(self) -> None:
        """Wait until the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def _fail(error: MmCacheError, reply: Reply, record: ResponseRecord) -> None:
    record.failed(error)
    if (cause := loggable_cause(error)) is not None:
        logger.debug("request %s: caused by %s", record.request_id, type(cause).__name__)
    await reply.error(error)
