"""The flights of a worker as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_mm_cache.cache.flight import FlightStatistics
from trtllm_mm_cache.observability.exposition import PREFIX, Reading


def flight_readings(flights: FlightStatistics) -> Iterable[Reading]:
    """Yield how many flights there were and are, and how many lookups joined one (were coalesced)."""
    yield Reading(f"{PREFIX}_flights", "Flights started.", "counter", flights.started)
    yield Reading(
        f"{PREFIX}_flights_joined", "Lookups that joined a flight under way.", "counter", flights.joined
    )
    yield Reading(f"{PREFIX}_flights_failed", "Flights that ended in an error.", "counter", flights.failed)
    yield Reading(
        f"{PREFIX}_flights_cancelled", "Flights nobody waited for any more.", "counter", flights.cancelled
    )
    yield Reading(f"{PREFIX}_flights_in_progress", "Flights under way.", "gauge", flights.in_flight)
    yield Reading(f"{PREFIX}_flight_waiters", "Lookups that wait for a flight.", "gauge", flights.waiters)
