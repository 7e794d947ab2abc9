"""The what-if curve as metrics: one gauge a capacity, labelled with its factor."""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_mm_cache.cache.what_if import WhatIfCurve
from trtllm_mm_cache.observability.exposition import PREFIX, Reading

_PREFIX = f"{PREFIX}_what_if"


def what_if_readings(curve: WhatIfCurve) -> Iterable[Reading]:
    """Yield the points, on how many look-ups they stand, and which share of the keys is followed."""
    for point in curve.points:
        yield Reading(
            f"{_PREFIX}_hit_ratio",
            "Hit ratio that this multiple of the capacity would have had on the last look-ups.",
            "gauge",
            point.hit_ratio,
            (("capacity", f"{point.factor:g}x"),),
        )
    yield Reading(f"{_PREFIX}_lookups", "Look-ups that the curve covers.", "gauge", curve.lookups)
    yield Reading(
        f"{_PREFIX}_sampling_share", "Share of the keys that is followed.", "gauge", curve.sampling_share
    )
