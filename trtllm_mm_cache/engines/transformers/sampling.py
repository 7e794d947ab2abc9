"""Sampling parameters to what `generate` takes, and the choice of a token."""

from __future__ import annotations

import math

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.checks import GREEDY_BELOW


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draw a token from the scores and leave it as the only possible one.

    `generate` itself draws from the process's one random state, which other requests and other
    threads advance: there a seed would promise nothing. Here each request has a generator of its own.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        probabilities = torch.softmax(scores.float().cpu(), dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -math.inf).scatter_(-1, drawn.to(scores.device), 0.0)


def logits_processors(sampling: SamplingParams) -> LogitsProcessorList:
    """Return the processors that narrow and draw; none for greedy decoding.

    In the usual order: temperature, top_k, top_p, draw.
    """
    if sampling.temperature is None or sampling.temperature < GREEDY_BELOW:
        return LogitsProcessorList()
    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None and sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Draw(sampling.seed))
    return processors
