"""What a sampling parameter may be, whatever the engine."""

from __future__ import annotations

import math

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.errors import InvalidRequestError


def check_sampling(sampling: SamplingParams) -> None:
    """Raise `InvalidRequestError` for a value that no sampler accepts, naming the field."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    checks = {
        "max_tokens must be at least 1": sampling.max_tokens is None or sampling.max_tokens >= 1,
        "min_tokens must not be negative": sampling.min_tokens >= 0,
        "temperature must be a number from 0": temperature is None
        or (math.isfinite(temperature) and temperature >= 0),
        "top_p must be above 0 and at most 1": top_p is None or 0 < top_p <= 1,
        "top_k must be at least 1, or 0 or -1 for all tokens": top_k is None or top_k >= -1,
        "seed must fit into 64 bits": sampling.seed is None or -(2**63) <= sampling.seed < 2**64,
        "stop must not hold an empty string": all(sampling.stop),
    }
    for rule, holds in checks.items():
        if not holds:
            raise InvalidRequestError(rule)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError("min_tokens must not be larger than max_tokens")
