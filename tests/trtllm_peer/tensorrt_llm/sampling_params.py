"""`tensorrt_llm/sampling_params.py`, 1.2 and 1.3: the fields, their defaults, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    """At most one of the fields."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Keyword-only; a field that is not listed is a `TypeError`."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    _stop_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise TypeError("seed: the binding takes an unsigned 64-bit integer")
        guide = self.guided_decoding
        if guide is not None and sum(bool(getattr(guide, name)) for name in guide.__slots__) > 1:
            raise ValueError("Only one guide can be used for a request")

    @property
    def greedy(self) -> bool:
        """As `_greedy_decoding`, by the rule of 1.1 and by that of 1.3, which must agree."""
        older = self.top_k in (None, 1) and self.top_p in (None, 0.0)
        newer = (
            (self.temperature is None and self.top_p is None and self.top_k is None)
            or self.top_k == 1
            or self.top_p == 0.0
            or self.temperature == 0
        )
        if older != newer:
            raise ValueError("these parameters are greedy in one release and drawn in another")
        return newer

    def setup(self, tokenizer: Any) -> None:
        """As `_setup`, which the engine calls only while `end_id` is None."""
        self.end_id = tokenizer.eos_token_id
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        self._stop_word_ids = [tokenizer.encode(text, add_special_tokens=False) for text in stops]

    def stop_words(self) -> list[list[int]]:
        """Token sequences that end an answer; none with `ignore_eos`, whatever was asked for."""
        if self.ignore_eos:
            return []
        return [[token] for token in self.stop_token_ids or []] + (self._stop_word_ids or [])
