"""One call at the encode worker: an item's bytes in, an exported embedding out.

The export leases the entry until the PD worker has READ it, or says that it will not.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from opentelemetry.trace import SpanKind

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.encode.calls import RunningCalls
from trtllm_mm_cache.encode.maker import EncodeJob
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.encode.pipeline import EncodePipeline, Origin
from trtllm_mm_cache.errors import MmCacheError, ProtocolMismatchError
from trtllm_mm_cache.observability.logs import loggable_cause
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.messages import EncodeCancel, EncodeFault, EncodeReady, EncodeRequest, parse
from trtllm_mm_cache.runtime.streaming import RequestContext, RequestStoppedError, stopped_with
from trtllm_mm_cache.transfer import Exporter, PeerMetadata

logger = logging.getLogger(__name__)


class EncodeServer:
    """Answers `EncodeRequest`s of PD workers. For use from one event loop; owns none of its parts.

    `peer` is the NIXL metadata under which the exporter's memory can be READ.
    """

    def __init__(
        self, pipeline: EncodePipeline, exporter: Exporter, peer: PeerMetadata, metrics: EncodeMetrics
    ) -> None:
        self._pipeline = pipeline
        self._exporter = exporter
        self._peer = peer.to_wire()
        self._metrics = metrics
        self._calls = RunningCalls()

    async def handle(self, payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
        """Answer one call with one message, `EncodeReady` or `EncodeFault`; none when it is taken back."""
        answer: EncodeReady | EncodeFault
        try:
            if isinstance(payload, dict) and "cancel" in payload:
                self._calls.take_back(parse(EncodeCancel, payload).cancel)
                return
            request = parse(EncodeRequest, payload)
            payload.pop("media")  # its sender may keep the rest until the answer
            self._check_fingerprint(request)
            parent = remote_parent(request.trace_headers)
            with (
                self._calls.running(context.id() or "") as taken_back,
                span("encode_request", parent=parent, kind=SpanKind.SERVER) as current,
            ):
                async with stopped_with(context, taken_back):
                    embedding = self._pipeline.encode(_job(request))
                    # The media are the pipeline's alone: it knows until when it needs them.
                    del payload, request
                    answer = await self._export(*await embedding)
                current.set_attributes({"origin": answer.origin, "bytes": answer.nbytes})
        except RequestStoppedError:
            return
        except MmCacheError as error:
            self._record(error, context)
            answer = EncodeFault.of(error)
        else:
            if context.is_stopped() or taken_back.done():  # what is sent now will not be READ
                self._exporter.release(answer.token)
                return
            self._metrics.delivered(answer.origin, encode_seconds=answer.encode_seconds)
        # After the block of the error: this may wait here for the caller, and must not keep it.
        yield answer.model_dump()

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop what is stored, and retain nothing of it that is being encoded now."""
        dropped, stored = await self._pipeline.drop(
            request.selection, deadline_s=request.deadline_s, bar_s=request.bar_s
        )
        return DropReport(
            entries=dropped.entries,
            nbytes=dropped.nbytes,
            under_way=stored.unfinished,
            stored=stored.entries,
            stored_bytes=stored.nbytes,
        )

    def _check_fingerprint(self, request: EncodeRequest) -> None:
        if request.fingerprint != self._pipeline.fingerprint:
            raise ProtocolMismatchError(
                "the PD worker and the encode worker run different models, engines, releases of "
                "transformers, stored dtypes or backgrounds; start both with the same --model-path, "
                "--engine, embedding dtype and --transparent-background; where they have environments of "
                "their own, encoder_transformers in pd.yaml is the encode worker's release"
            )

    async def _export(self, lease: Lease, origin: Origin) -> EncodeReady:
        metadata, dtype = lease.metadata, str(lease.dtype).removeprefix("torch.")
        rows, width = lease.shape
        key = lease.key
        export = await self._exporter.export(lease)
        return EncodeReady(
            fingerprint=self._pipeline.fingerprint,
            key=key,
            peer=self._peer,
            token=export.token,
            address=export.address,
            nbytes=export.nbytes,
            checksum=export.checksum,
            dtype=dtype,
            shape=(rows, width),
            grid_thw=metadata.grid_thw,
            placeholder=metadata.placeholder,
            encode_seconds=metadata.encode_seconds,
            origin=origin,
        )

    def _record(self, error: MmCacheError, context: RequestContext) -> None:
        self._metrics.errors.labels(error.code).inc()
        logger.warning(
            "call %s: embedding not delivered: %s: %s",
            context.id(),
            error.code,
            error.message,
            extra={"call_id": context.id(), "code": error.code},
            exc_info=loggable_cause(error),
        )


def _job(request: EncodeRequest) -> EncodeJob:
    return EncodeJob(
        key=request.key,
        media=request.media,
        processor_kwargs=request.processor_kwargs,
        variant=request.variant,
        scope=request.scope,
        fresh=request.fresh,
    )
