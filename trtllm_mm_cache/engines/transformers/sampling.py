"""Sampling parameters to what `generate` takes, and the choice of a token.

The order is vLLM's: what the model says is noted for `logprobs`; then the constraint, min_tokens, bias,
penalties, temperature, min_p, top_k, top_p, and the draw. All of it is on the rank that chooses tokens, and
none of it may raise there: the values were checked before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtllm_mm_cache.engines.base import PlaceLogprobs, SamplingParams, TokenLogprob
from trtllm_mm_cache.engines.checks import GREEDY_BELOW

LEAST_LOGPROB = -9999.0
"""What stands for the logarithm of zero, as in OpenAI's API: JSON has no infinity."""


class ModelsLogprobs(LogitsProcessor):  # type: ignore[misc]
    """Notes the model's own scores at each place; `at` reads the newest. First among the processors."""

    def __init__(self, likeliest: int) -> None:
        self._likeliest = likeliest
        self._scores = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores`; none of the processors after this one writes into them."""
        del input_ids
        self._scores = scores[0]
        return scores

    def at(self, token: int) -> PlaceLogprobs:
        """Return the log probabilities at the newest place, where `token` was chosen."""
        logprobs = torch.log_softmax(self._scores.float(), dim=-1).clamp_(min=LEAST_LOGPROB)
        values, ids = logprobs.topk(min(self._likeliest, logprobs.shape[-1]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return PlaceLogprobs(
            TokenLogprob(token, logprobs[token].item()), tuple(TokenLogprob(*pair) for pair in pairs)
        )


class _Bias(LogitsProcessor):  # type: ignore[misc]
    """Add each token's bias to its score."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        ids, values = self._ids.to(scores.device), self._values.to(scores)
        return scores.index_add(-1, ids, values[None])


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """Repetition over prompt and answer; frequency and presence over the answer, as OpenAI's API has them.

    Hugging Face's own repetition penalty looks up every token of the prompt, and an image's token may lie
    outside the vocabulary.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._length: int | None = None
        self._counts = self._seen = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._count(input_ids[0], scores)
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            factor = torch.where(scores > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
            scores = torch.where(self._seen, scores * factor, scores)
        present = (self._counts > 0).to(scores)
        return scores - sampling.frequency_penalty * self._counts - sampling.presence_penalty * present

    def _count(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Count what is new since the last call: the prompt at first, then a token each time."""
        if self._length is None:
            self._seen = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
            self._counts = torch.zeros(scores.shape[-1], device=scores.device)
            self._seen[input_ids[input_ids < scores.shape[-1]]] = True
        else:
            new = input_ids[self._length :]
            self._seen[new] = True
            self._counts.index_add_(0, new, torch.ones(len(new), device=scores.device))
        self._length = len(input_ids)


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
    """Return the processors that shift, narrow and draw; none for plain greedy decoding."""
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(_Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
        processors.append(_Penalties(sampling))
    if sampling.temperature is None or sampling.temperature < GREEDY_BELOW:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k is not None and sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Draw(sampling.seed))
    return processors


def min_tokens_processor(
    min_tokens: int, prompt_tokens: int, stop_token_ids: Sequence[int], device: torch.device
) -> LogitsProcessor | None:
    """Return what keeps the stop tokens away until `min_tokens` are there; None where nothing has to.

    `generate` would put its own before everything else, and what is noted would not be the model's.
    """
    if not min_tokens or not stop_token_ids:
        return None
    return MinNewTokensLengthLogitsProcessor(
        prompt_tokens, min_tokens, list(stop_token_ids), device=str(device)
    )
