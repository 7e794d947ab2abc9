"""Each sampling parameter arrives under the engine's name, or the request is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.trtllm.sampling import engine_sampling
from trtllm_mm_cache.errors import InvalidRequestError

ALWAYS = {"detokenize": False, "include_stop_str_in_output": True, "ignore_eos": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_tokens": 100, "top_k": 1}),
        ({"max_tokens": 5}, {"max_tokens": 5, "top_k": 1}),
        ({"max_tokens": 500, "min_tokens": 400}, {"max_tokens": 100, "min_tokens": 100, "top_k": 1}),
        ({"temperature": 0.0}, {"max_tokens": 100, "top_k": 1}),
        ({"temperature": 1e-9, "top_p": 0.5}, {"max_tokens": 100, "top_k": 1}),
        ({"temperature": 0.7}, {"max_tokens": 100, "temperature": 0.7, "top_p": 1.0}),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 7},
            {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 7},
        ),
        ({"temperature": 0.7, "top_k": -1}, {"max_tokens": 100, "temperature": 0.7, "top_p": 1.0}),
        (
            {"stop": ("a", "b"), "stop_token_ids": (3, 4)},
            {"max_tokens": 100, "top_k": 1, "stop": ["a", "b"], "stop_token_ids": [3, 4]},
        ),
        ({"ignore_eos": True}, {"max_tokens": 100, "top_k": 1, "ignore_eos": True}),
    ],
)
def test_one_by_one(given: dict[str, Any], expected: dict[str, Any], peer: Any) -> None:
    arguments = engine_sampling(SamplingParams(**given), 100)
    assert arguments == ALWAYS | expected
    engine = peer.SamplingParams(**arguments)
    assert engine.greedy == (given.get("temperature", 0) < 1e-5), "and so in every release"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ignore_eos": True, "stop": ("x",)}, "ignore_eos together with stop"),
        ({"ignore_eos": True, "stop_token_ids": (3,)}, "ignore_eos together with stop"),
        ({"seed": -1, "temperature": 1.0}, "seed must not be negative"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"stop": ("",)}, "empty string"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        engine_sampling(SamplingParams(**given), 100)


def test_no_field_of_ours_is_dropped() -> None:
    """A new field of `SamplingParams` must be mapped or refused: this list has to grow with it."""
    assert set(SamplingParams.__dataclass_fields__) == {
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed"),
        *("stop", "stop_token_ids", "ignore_eos"),
    }
