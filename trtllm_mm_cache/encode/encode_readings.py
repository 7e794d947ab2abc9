"""What the parts of an encode worker count, as metrics at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from trtllm_mm_cache.cache.flight import FlightStatistics
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.encode.batcher import BatcherStatistics
from trtllm_mm_cache.observability.cache_readings import arena_readings, cache_readings
from trtllm_mm_cache.observability.exposition import PREFIX, Reading
from trtllm_mm_cache.observability.flight_readings import flight_readings
from trtllm_mm_cache.runtime.admission import AdmissionStatistics
from trtllm_mm_cache.transfer import Exporter


def encode_readings(
    manager: MultimodalEmbeddingCacheManager,
    flights: FlightStatistics,
    batches: BatcherStatistics,
    queue: AdmissionStatistics,
    exporter: Exporter,
) -> Iterable[Reading | Metric]:
    """Yield the snapshots of an encode worker's parts. Any thread."""
    stats = manager.statistics()
    yield from cache_readings(stats)
    yield from arena_readings({"cache": stats})
    yield from flight_readings(flights)
    yield from _batch_readings(batches)
    yield from _queue_readings(queue)
    yield from _export_readings(exporter)


def _batch_readings(batches: BatcherStatistics) -> Iterable[Reading]:
    yield Reading(f"{PREFIX}_encodes", "Images through the vision tower.", "counter", batches.images)
    yield Reading(
        f"{PREFIX}_encode_failures", "Images the vision tower failed on.", "counter", batches.failures
    )
    yield Reading(f"{PREFIX}_encode_batches", "Runs of the vision tower.", "counter", batches.batches)
    yield Reading(f"{PREFIX}_encode_queue", "Images waiting for the tower.", "gauge", batches.queued)


def _queue_readings(queue: AdmissionStatistics) -> Iterable[Reading]:
    yield Reading(
        f"{PREFIX}_waiting_image_bytes", "Bytes of images without an embedding yet.", "gauge", queue.nbytes
    )
    yield Reading(
        f"{PREFIX}_refused", "Refused: too much under way.", "counter", queue.refused, (("what", "image"),)
    )


def _export_readings(exporter: Exporter) -> Iterable[Reading]:
    exports = exporter.statistics()
    outcomes = {"read": exports.acked, "released": exports.released, "timed_out": exports.timed_out}
    for outcome, count in outcomes.items():
        yield Reading(f"{PREFIX}_exports", "Exports that ended.", "counter", count, (("outcome", outcome),))
    yield Reading(f"{PREFIX}_exports_held", "Exports leased until their READ.", "gauge", exports.held)
    yield Reading(f"{PREFIX}_exports_held_bytes", "Their bytes.", "gauge", exports.held_bytes)
