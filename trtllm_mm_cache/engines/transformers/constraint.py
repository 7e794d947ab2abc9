"""Holds an answer to a schema or pattern: at each place the grammar says which tokens may follow."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.grammar import check_alone, grammar_of, import_llguidance, refusal


class ConstraintCompiler:
    """Makes the constraint of a request. Thread-safe. `eos_token_ids` may end an answer."""

    def __init__(self, tokenizer: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._made: Any = None
        self._making = threading.Lock()

    def __call__(self, sampling: SamplingParams) -> FollowedConstraint | None:
        """Return what holds an answer to `sampling.constraint`; None where there is none.

        Blocking: milliseconds, and once a second for a large vocabulary. Raises `InvalidRequestError`.
        """
        if sampling.constraint is None:
            return None
        check_alone(sampling)
        grammar = grammar_of(sampling.constraint)
        matcher = import_llguidance().LLMatcher(self._for_library(), grammar, log_level=0)
        if matcher.is_error():
            raise refusal(matcher.get_error())
        return FollowedConstraint(matcher)

    def _for_library(self) -> Any:
        with self._making:
            if self._made is None:
                from llguidance.hf import from_tokenizer

                self._made = from_tokenizer(self._tokenizer, eos_token=self._eos_token_ids or None)
            return self._made


class FollowedConstraint(LogitsProcessor):  # type: ignore[misc]
    """One answer's constraint. It never raises: where several ranks compute, that would end the worker."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Whether nothing can follow any more, or the grammar has failed."""
        return bool(self._matcher.is_stopped() or self._matcher.is_error())

    def check(self) -> None:
        """Raise `InvalidRequestError` when the grammar has failed, which it does when it costs too much."""
        if self._matcher.is_error():
            raise refusal(self._matcher.get_error())

    def take(self, token: int) -> None:
        """Go on by the token that was chosen."""
        if not self.ended:
            self._matcher.consume_token(token)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` with minus infinity for every token that may not follow."""
        del input_ids
        if self.ended:
            return scores
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(allowed, bitorder="little", count=scores.shape[-1])
        if self._matcher.is_error() or not bits.any():
            return scores
        return scores.masked_fill(torch.from_numpy(bits == 0).to(scores.device), -math.inf)
