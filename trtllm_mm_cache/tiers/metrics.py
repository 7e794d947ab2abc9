"""What a stored tier counts, and how it becomes metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from trtllm_mm_cache.observability.metrics import samples
from trtllm_mm_cache.tiers.format import REFUSALS
from trtllm_mm_cache.tiers.offers import OUTCOMES, Offers
from trtllm_mm_cache.tiers.storage import Contents

Lookup = Literal["hit", "absent", "refused", "failed", "busy", "passed_over", "unused"]
LOOKUPS: Final[tuple[Lookup, ...]] = get_args(Lookup)
"""How a lookup in a tier ended: committed; not there; there and wrong; error or deadline; no thread free;
not asked, after failures in a row; found and not taken, for there was no room or the request was over."""


@dataclass
class TierCounts:
    """What a tier has counted since the start: entries `refused` by reason, bytes brought and taken."""

    lookups: Counter[Lookup] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    read_bytes: int = 0
    written_bytes: int = 0
    drops_failed: int = 0


def tier_metrics(
    tier: str, counts: TierCounts, offers: Offers, contents: Contents, stuck: int, passed_over: bool
) -> Iterable[Metric]:
    """Yield the metrics of one tier. Any thread."""
    outcomes = offers.outcomes
    refusals = {reason: counts.refused[reason] for reason in (*REFUSALS, *sorted(counts.refused))}
    written = {"read": counts.read_bytes, "written": counts.written_bytes}
    errors = {
        "read": counts.lookups["failed"],
        "store": outcomes["failed"],
        "drop": counts.drops_failed,
        "tidy": offers.errors,
    }
    looked_up = _of(counts.lookups, LOOKUPS)
    for name, text, label, numbers in (
        ("tier_lookups", "Lookups in a tier, by how they ended.", "outcome", looked_up),
        ("tier_refused", "Entries refused and removed, by reason.", "reason", refusals),
        ("tier_offers", "Embeddings offered, by how that ended.", "outcome", _of(outcomes, OUTCOMES)),
        ("tier_bytes", "Bytes of embeddings that a tier brought and took.", "direction", written),
        ("tier_errors", "Calls of a tier that failed, by what was called.", "call", errors),
    ):
        rows = [({"tier": tier, label: each}, number) for each, number in numbers.items()]
        yield samples(CounterMetricFamily, name, text, rows)
    waiting, waiting_bytes = offers.waiting
    for name, text, value in (
        ("tier_waiting_offers", "Embeddings that wait to be stored in a tier.", waiting),
        ("tier_waiting_bytes", "Their bytes, which are held in the arena.", waiting_bytes),
        ("tier_stuck_threads", "Threads of a tier that are past the deadline of their call.", stuck),
        ("tier_passed_over", "1 while a tier is passed over after failures.", passed_over),
        ("tier_entries", "Entries that lie in a tier.", contents.entries),
        ("tier_stored_bytes", "Their bytes.", contents.nbytes),
        ("tier_capacity_bytes", "Most bytes that may lie in a tier.", contents.capacity),
    ):
        values = [] if value is None else [({"tier": tier}, float(value))]
        yield samples(GaugeMetricFamily, name, text, values)


def _of(counts: Mapping[Any, int], names: Iterable[str]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in names}
