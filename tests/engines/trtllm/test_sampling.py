"""Each sampling parameter arrives under the engine's name, or the request is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.engines.trtllm.sampling import engine_guide, engine_sampling
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
        ({"logprobs": 0}, {"max_tokens": 100, "top_k": 1, "logprobs": 1}),
        ({"logprobs": 7}, {"max_tokens": 100, "top_k": 1, "logprobs": 7}),
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
        ({"presence_penalty": 0.5}, "presence_penalty is not served with TensorRT-LLM"),
        ({"frequency_penalty": -0.5}, "frequency_penalty is not served with TensorRT-LLM"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not served with TensorRT-LLM"),
        ({"min_p": 0.1}, "min_p is not served with TensorRT-LLM"),
        ({"logit_bias": {3: 1.0}}, "logit_bias is not served with TensorRT-LLM"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"choices": 2}, "n: this server's engine gives one answer"),
        ({"prompt_logprobs": 0}, "prompt_logprobs: this server's engine does not report them"),
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
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias"),
        *("logprobs", "prompt_logprobs", "constraint", "choices"),
    }


SCHEMA = Constraint("json_schema", '{"type": "object"}')


def test_a_constraint_becomes_the_engines_guide(peer: Any) -> None:
    from tensorrt_llm.llmapi import GuidedDecodingParams

    for constraint, field in ((SCHEMA, "json"), (Constraint("regex", "[0-9]+"), "regex")):
        guide = engine_guide(SamplingParams(constraint=constraint), "xgrammar")
        assert guide == {field: constraint.text}
        assert getattr(GuidedDecodingParams(**guide), field) == constraint.text
    assert engine_guide(SamplingParams(), "xgrammar") is None


@pytest.mark.parametrize(
    ("sampling", "backend", "says"),
    [
        (SamplingParams(constraint=SCHEMA), None, "has no guided_decoding_backend"),
        (SamplingParams(constraint=SCHEMA, ignore_eos=True), "xgrammar", "leave ignore_eos out"),
        (SamplingParams(constraint=SCHEMA, min_tokens=3), "xgrammar", "leave min_tokens out"),
        (SamplingParams(constraint=Constraint("regex", "(")), "xgrammar", "response_format.*pattern"),
        (SamplingParams(constraint=Constraint("json_schema", "no")), "xgrammar", "must be a JSON object"),
    ],
)
def test_a_constraint_that_the_engine_cannot_follow(
    sampling: SamplingParams, backend: str | None, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        engine_guide(sampling, backend)
