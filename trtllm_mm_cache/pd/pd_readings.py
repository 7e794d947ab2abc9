"""What the parts of a PD worker count, as metrics at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from trtllm_mm_cache.observability.cache_readings import arena_readings, cache_readings
from trtllm_mm_cache.observability.exposition import PREFIX, Reading
from trtllm_mm_cache.observability.flight_readings import flight_readings
from trtllm_mm_cache.observability.what_if_readings import what_if_readings
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.pd.memory import PdMemory
from trtllm_mm_cache.pd.resolve import ItemResolver
from trtllm_mm_cache.runtime.admission import AdmissionStatistics
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.tiers.breaker import BreakerState, BreakerStatistics
from trtllm_mm_cache.transfer import Reader

_BREAKER_STATES: tuple[BreakerState, ...] = ("closed", "open", "half-open")


def pd_readings(
    memory: PdMemory, resolver: ItemResolver, client: EncodeClient, worker: PdWorker
) -> Iterable[Reading | Metric]:
    """Yield the snapshots of a PD worker's parts. Any thread."""
    cache, transit = memory.cache.statistics(), memory.transit.statistics()
    yield from cache_readings(cache)
    retains = memory.cache is not memory.transit
    yield from arena_readings({"cache": cache, "transit": transit} if retains else {"transit": transit})
    if memory.what_if is not None:
        yield from what_if_readings(memory.what_if.curve())
    yield from flight_readings(resolver.flights.statistics())
    yield from _resolver_readings(resolver)
    yield from _read_readings(memory.reader)
    yield from _encode_worker_readings(client, resolver.breakers())
    yield from _breaker_readings(resolver.breakers())
    yield from _overload_readings(worker.running(), resolver.waiting())


def _resolver_readings(resolver: ItemResolver) -> Iterable[Reading]:
    counts = resolver.statistics()
    yield Reading(f"{PREFIX}_encode_retries", "Second attempts at an embedding.", "counter", counts.retries)
    yield Reading(
        f"{PREFIX}_uncached", "Embeddings served without entering the cache.", "counter", counts.uncached
    )


def _read_readings(reader: Reader) -> Iterable[Reading]:
    reads = reader.statistics()
    outcomes = {
        "done": reads.reads - reads.corrupt - reads.not_finite,
        "failed": reads.failed,
        "timed_out": reads.timed_out,
        "corrupt": reads.corrupt,
        "not_finite": reads.not_finite,
    }
    for outcome, count in outcomes.items():
        yield Reading(f"{PREFIX}_reads", "NIXL READs that ended.", "counter", count, (("outcome", outcome),))
    yield Reading(f"{PREFIX}_read_bytes", "Bytes that READs brought.", "counter", reads.read_bytes)
    yield Reading(f"{PREFIX}_reads_in_flight", "READs NIXL works on.", "gauge", reads.in_flight)
    yield Reading(f"{PREFIX}_reads_unsettled", "Those past their deadline.", "gauge", reads.unsettled)


def _encode_worker_readings(client: EncodeClient, breakers: BreakerStatistics) -> Iterable[Reading]:
    instances = client.instances
    yield Reading(f"{PREFIX}_encode_workers", "Encode workers in discovery.", "gauge", len(instances))
    for instance in instances:
        yield Reading(
            f"{PREFIX}_encode_worker_live",
            "1 for each encode worker in discovery, by instance id.",
            "gauge",
            1,
            (("instance", f"{instance:x}"),),
        )
        for state in _BREAKER_STATES:
            yield Reading(
                f"{PREFIX}_encode_worker_breaker",
                "1 for the state of each encode worker's breaker.",
                "gauge",
                breakers.states.get(instance, "closed") == state,
                (("instance", f"{instance:x}"), ("state", state)),
            )


def _breaker_readings(breakers: BreakerStatistics) -> Iterable[Reading]:
    for state in _BREAKER_STATES:
        yield Reading(
            f"{PREFIX}_encode_breakers",
            "Encode workers that were called, by the state of their breaker.",
            "gauge",
            sum(one == state for one in breakers.states.values()),
            (("state", state),),
        )
    yield Reading(f"{PREFIX}_encode_breaker_opened", "Breakers that opened.", "counter", breakers.opened)
    yield Reading(
        f"{PREFIX}_encode_breaker_passed_over",
        "Times that an encode worker was passed over.",
        "counter",
        breakers.refused,
    )


def _overload_readings(running: AdmissionStatistics, waiting: AdmissionStatistics) -> Iterable[Reading]:
    yield Reading(
        f"{PREFIX}_waiting_image_bytes", "Bytes of images without an embedding yet.", "gauge", waiting.nbytes
    )
    for what, refused in (("request", running.refused), ("image", waiting.refused)):
        yield Reading(
            f"{PREFIX}_refused", "Refused: too much under way.", "counter", refused, (("what", what),)
        )
