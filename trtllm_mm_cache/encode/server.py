"""One call at the encode worker: an item's bytes in, an exported embedding out.

The export leases the entry until the PD worker has READ it, or says that it will not.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from opentelemetry.trace import SpanKind

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.encode.pipeline import EncodeJob, EncodePipeline, Origin
from trtllm_mm_cache.errors import MmCacheError, ProtocolMismatchError
from trtllm_mm_cache.observability.logs import loggable_cause
from trtllm_mm_cache.observability.traces import remote_parent, span
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.messages import EncodeFault, EncodeReady, EncodeRequest, parse
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

    async def handle(self, payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
        """Answer one call with one message: `EncodeReady` or `EncodeFault`."""
        try:
            ready = await self._ready(payload, context)
        except RequestStoppedError:
            return
        except MmCacheError as error:
            self._record(error, context)
            fault = EncodeFault.of(error)
        else:
            if context.is_stopped():  # what is sent now is dropped on the way, and will not be READ
                self._exporter.release(ready.token)
                return
            self._metrics.delivered(ready.origin, encode_seconds=ready.encode_seconds)
            yield ready.model_dump()
            return
        yield fault.model_dump()

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop what is stored, and retain nothing of it that is being encoded now."""
        dropped = self._pipeline.drop(request.selection)
        return DropReport(entries=dropped.entries, nbytes=dropped.nbytes)

    async def _ready(self, payload: Any, context: RequestContext) -> EncodeReady:
        request = parse(EncodeRequest, payload)
        del payload
        if request.fingerprint != self._pipeline.fingerprint:
            raise ProtocolMismatchError(
                "the PD worker and the encode worker run different models, engines or stored dtypes; "
                "start both with the same --model-path, --engine and embedding dtype"
            )
        parent = remote_parent(request.trace_headers)
        with span("encode_request", parent=parent, kind=SpanKind.SERVER) as current:
            async with stopped_with(context):
                lease, origin = await self._pipeline.encode(_job(request))
                ready = await self._export(lease, origin)
            current.set_attributes({"origin": ready.origin, "bytes": ready.nbytes})
        return ready

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
