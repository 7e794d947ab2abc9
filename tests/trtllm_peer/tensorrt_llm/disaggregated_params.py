"""`tensorrt_llm/disaggregated_params.py`, 1.3 and newer: the fields, and what is checked when one is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")


@dataclass(slots=True, kw_only=True, eq=False)
class DisaggregatedParams:
    """Keyword-only. Hashes: one for each handle, each a list of exactly eight ints."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_log_probs: list[Any] | None = None
    first_gen_logits: list[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: int | None = None
    ctx_usage: dict[str, Any] | None = None  # this and the layout: newer than 1.3
    conversation_id: str | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    multimodal_hashes: list[list[int]] | None = None
    mrope_position_ids_handle: dict[str, Any] | None = None
    mrope_position_deltas_handle: dict[str, Any] | None = None
    multimodal_layout: Any = None

    def __post_init__(self) -> None:
        if self.request_type is not None and self.request_type.lower() not in _REQUEST_TYPES:
            raise ValueError(f"Unknown request type: {self.request_type}")
        if self.multimodal_embedding_handles is None or self.multimodal_hashes is None:
            return
        assert len(self.multimodal_embedding_handles) == len(self.multimodal_hashes)
        for item in self.multimodal_hashes:
            assert isinstance(item, list), "a hash is a list"
            assert len(item) == 8, "a hash has eight integers"
            assert all(isinstance(number, int) for number in item), "a hash has integers"
            # The binding takes them as int32.
            assert all(-(2**31) <= number < 2**31 for number in item), "a hash has 32-bit integers"
