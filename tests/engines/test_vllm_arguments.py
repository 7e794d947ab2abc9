"""What reaches vLLM of a YAML file and of a request: needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtllm_mm_cache.engines.base import Constraint, SamplingParams
from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.registry import find_engine
from trtllm_mm_cache.engines.vllm.engine_input import place_images
from trtllm_mm_cache.engines.vllm.sampling import engine_constraint, engine_sampling
from trtllm_mm_cache.engines.vllm.settings import FORCED, VllmEngineArgs
from trtllm_mm_cache.engines.vllm.support import is_known_release
from trtllm_mm_cache.errors import ConfigurationError, InvalidRequestError, PlaceholderMismatchError

VOCABULARY = 100

ALWAYS = {
    "n": 1,
    "max_tokens": 50,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "stop": [],
    "detokenize": False,
    "include_stop_str_in_output": True,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "flat_logprobs": False,
    "temperature": 0.0,
}
DRAWN = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_tokens": 9, "min_tokens": 3}, {"max_tokens": 9, "min_tokens": 3}),
        ({"max_tokens": 900, "min_tokens": 70}, {"max_tokens": 50, "min_tokens": 50}),
        ({"temperature": 1e-6, "top_p": 0.5}, {}),
        ({"temperature": 0.7}, DRAWN),
        ({"temperature": 0.7, "top_p": 0.5, "top_k": 4}, DRAWN | {"top_p": 0.5, "top_k": 4}),
        ({"temperature": 0.7, "top_k": -1, "min_p": 0.2}, DRAWN | {"min_p": 0.2}),
        ({"temperature": 0.7, "seed": 7, "choices": 3}, DRAWN | {"seed": 7, "n": 3}),
        ({"temperature": 0.7, "seed": -1}, DRAWN | {"seed": 2**63 - 1}),
        ({"stop": ("a", "b")}, {"stop": ["a", "b"], "detokenize": True}),
        ({"stop_token_ids": (3, 4), "ignore_eos": True}, {"stop_token_ids": [3, 4], "ignore_eos": True}),
        ({"prompt_logprobs": 0}, {"prompt_logprobs": 0, "flat_logprobs": True}),
        ({"presence_penalty": 0.5, "frequency_penalty": -1.0}, None),
        ({"repetition_penalty": 1.5, "logit_bias": {3: -100.0}, "logprobs": 5}, None),
    ],
)
def test_one_by_one(given: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """`expected` None: by the same names and values."""
    arguments = engine_sampling(SamplingParams(**given), 50, VOCABULARY)
    assert arguments == ALWAYS | (given if expected is None else expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"choices": 2}, "n: with temperature 0"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias: token id 100"),
        ({"temperature": 2.5}, "temperature must be from 0 to 2 with vLLM"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be from 0 to 20"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        engine_sampling(SamplingParams(**given), 50, VOCABULARY)


def test_no_field_of_ours_is_dropped() -> None:
    """A new field of `SamplingParams` must be mapped or refused: this list has to grow with it."""
    assert set(SamplingParams.__dataclass_fields__) == {
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed"),
        *("stop", "stop_token_ids", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias"),
        *("logprobs", "prompt_logprobs", "constraint", "choices"),
    }


def test_a_constraint_keeps_its_schema_and_gets_the_bound_on_blanks() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = SamplingParams(constraint=Constraint("json_schema", json.dumps(schema)))
    arguments = engine_constraint(given)
    assert arguments is not None
    sent = json.loads(arguments["json"])
    assert sent.pop("x-guidance")["whitespace_pattern"].endswith("{1,64}")
    assert sent == schema
    assert engine_constraint(SamplingParams(constraint=Constraint("regex", "a+"))) == {"regex": "a+"}
    assert engine_constraint(SamplingParams()) is None
    for refused in (Constraint("regex", "a("), Constraint("json_schema", '"text"')):
        with pytest.raises(InvalidRequestError, match="structured output"):
            engine_constraint(SamplingParams(constraint=refused))


def test_what_this_project_decides_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    for name, reason in FORCED.items():
        file.write_text(f"{name}: 1\n")
        with pytest.raises(ConfigurationError, match=name) as caught:
            load_engine_args(file, VllmEngineArgs)
        assert reason in str(caught.value)
        assert name not in VllmEngineArgs.model_fields
    file.write_text("max_nums_seqs: 1\n")
    with pytest.raises(ConfigurationError, match="unknown key 'max_nums_seqs'"):
        load_engine_args(file, VllmEngineArgs)


def test_only_what_is_given_goes_to_vllm() -> None:
    assert VllmEngineArgs().given() == {}
    args = VllmEngineArgs(
        max_model_len=99, dtype="float16", encoder_dtype="bfloat16", encoder_transformers="5.23.0"
    )
    assert args.given() == {"max_model_len": 99}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32", "text_config": {"dtype": "float16"}}, "float16"),
    ],
)
def test_the_dtype_is_what_the_models_files_say(tmp_path: Path, config: Any, dtype: str) -> None:
    """vLLM's own "auto" would compute a float32 model in a half type, and embeddings would not fit."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VllmEngineArgs().resolved_dtype(tmp_path) == dtype
    assert VllmEngineArgs(dtype="float32").resolved_dtype(tmp_path) == "float32"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="set dtype"):
        VllmEngineArgs().resolved_dtype(tmp_path)


def test_architectures_and_halves_that_are_not_served() -> None:
    engine = find_engine("vllm")
    engine.check("pd", {"model_type": "qwen2_vl"}, None)
    with pytest.raises(ConfigurationError, match=r"'gemma3'.*compared with vLLM's own"):
        engine.check("pd", {"model_type": "gemma3"}, None)
    with pytest.raises(ConfigurationError, match="--engine transformers"):
        engine.check("encode", {}, None)
    with pytest.raises(ConfigurationError, match="tensor_parallel_size"):
        engine.follow(None)


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.33.4", True), ("0.31.9", False), ("0.34.0rc1", False), ("dev", False)],
)
def test_releases(version: str, known: bool) -> None:
    assert is_known_release(version) is known


def test_where_images_lie_in_a_prompt() -> None:
    image, other = 9, 8
    prompt = [1, image, image, 2, other, image, other, image, 3]
    first, second = place_images(prompt, image, [2, 2])
    assert (first.offset, first.length, first.is_embed) == (1, 2, None)
    assert (second.offset, second.length) == (5, 3)
    assert second.is_embed is not None
    assert second.is_embed.tolist() == [True, False, True]
    touching = place_images([image] * 3, image, [1, 2])
    assert [(each.offset, each.length) for each in touching] == [(0, 1), (1, 2)]
    for rows in ([2], [2, 3]):
        with pytest.raises(PlaceholderMismatchError, match="4 image tokens"):
            place_images(prompt, image, rows)
