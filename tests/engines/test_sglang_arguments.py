"""What reaches SGLang of a YAML file and of a request: needs no SGLang."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.conftest import stored
from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import Constraint, EncodedItem, SamplingParams
from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.huggingface.expanded import runs_of
from trtllm_mm_cache.engines.registry import find_engine
from trtllm_mm_cache.engines.sglang.handed_over import HandedOver, hand_over
from trtllm_mm_cache.engines.sglang.outputs import delta_of
from trtllm_mm_cache.engines.sglang.sampling import engine_sampling
from trtllm_mm_cache.engines.sglang.settings import FORCED, SglangEngineArgs
from trtllm_mm_cache.errors import (
    ConfigurationError,
    GenerationError,
    InvalidRequestError,
    PlaceholderMismatchError,
)

VOCABULARY = 100

ALWAYS = {
    "max_new_tokens": 50,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "stop": [],
    "no_stop_trim": True,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "temperature": 0.0,
}
DRAWN = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "sampling_seed": None}


def arguments(deterministic: bool = True, **given: Any) -> list[dict[str, Any]]:
    return engine_sampling(SamplingParams(**given), 50, VOCABULARY, deterministic=deterministic)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_tokens": 9, "min_tokens": 3}, {"max_new_tokens": 9, "min_new_tokens": 3}),
        ({"max_tokens": 900, "min_tokens": 70}, {"max_new_tokens": 50, "min_new_tokens": 50}),
        ({"temperature": 1e-6, "top_p": 0.5}, {}),
        ({"temperature": 0.7}, DRAWN),
        ({"temperature": 0.7, "top_p": 0.5, "top_k": 4}, DRAWN | {"top_p": 0.5, "top_k": 4}),
        ({"temperature": 0.7, "top_k": 0, "min_p": 0.2}, DRAWN | {"min_p": 0.2}),
        ({"temperature": 0.7, "seed": 7}, DRAWN | {"sampling_seed": 7}),
        ({"temperature": 0.7, "seed": 2**64 - 1}, DRAWN | {"sampling_seed": -1}),
        ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"stop_token_ids": (3, 4)}, {"stop_token_ids": [3, 4]}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"presence_penalty": 0.5, "frequency_penalty": -1.0}, None),
        (
            {"repetition_penalty": 1.5, "logit_bias": {3: -100.0}},
            {"repetition_penalty": 1.5, "logit_bias": {"3": -100.0}},
        ),
        ({"logprobs": 20}, {}),
        ({"constraint": Constraint("regex", "a+")}, {"regex": "a+"}),
        ({"constraint": Constraint("json_schema", "{}")}, {"json_schema": "{}"}),
    ],
)
def test_one_by_one(given: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """`expected` None: by the same names and values."""
    assert arguments(**given) == [ALWAYS | (given if expected is None else expected)]


def test_choices_are_drawn_with_seeds_that_follow_each_other() -> None:
    seeds = [each["sampling_seed"] for each in arguments(temperature=0.7, seed=2**63 - 1, choices=3)]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [each["sampling_seed"] for each in arguments(temperature=0.7, choices=2)] == [None, None]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"choices": 2}, "n: with temperature 0"),
        ({"prompt_logprobs": 0}, "prompt_logprobs: this server's engine does not report them"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias: token id 100"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"repetition_penalty": 2.5}, "repetition_penalty must be at most 2"),
        ({"stop": tuple("abcdefghijklmnopqrstuvwxyzABCDEFG")}, "stop must have at most 32"),
        ({"seed": 1, "temperature": 0.5, "deterministic": False}, "seed: .*enable_deterministic_inference"),
        ({"stop_token_ids": (3,), "ignore_eos": True}, "stop_token_ids: .*ignore_eos"),
        ({"logprobs": 0, "logit_bias": {3: 1.0}}, "logprobs: .*after logit_bias"),
        ({"logprobs": 0, "presence_penalty": 1.0}, "logprobs: .*after presence_penalty"),
        ({"logprobs": 0, "frequency_penalty": 1.0}, "logprobs: .*after frequency_penalty"),
        ({"logprobs": 0, "repetition_penalty": 1.1}, "logprobs: .*after repetition_penalty"),
        ({"logprobs": 0, "min_tokens": 2}, "logprobs: .*after min_tokens"),
        ({"logprobs": 0, "constraint": Constraint("regex", "a")}, "logprobs: .*after structured output"),
        ({"constraint": Constraint("regex", "a(")}, "structured output"),
        ({"constraint": Constraint("json_schema", '"text"')}, "structured output"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        arguments(**given)


def test_a_greedy_answer_needs_no_seed() -> None:
    assert arguments(deterministic=False, seed=1) == [ALWAYS]


def test_no_field_of_ours_is_dropped() -> None:
    """A new field of `SamplingParams` must be mapped or refused: this list has to grow with it."""
    assert set(SamplingParams.__dataclass_fields__) == {
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed"),
        *("stop", "stop_token_ids", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias"),
        *("logprobs", "prompt_logprobs", "constraint", "choices"),
    }


def test_what_this_project_decides_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    for name, reason in FORCED.items():
        file.write_text(f"{name}: 1\n")
        with pytest.raises(ConfigurationError, match=name) as caught:
            load_engine_args(file, SglangEngineArgs)
        assert reason in str(caught.value)
        assert name not in SglangEngineArgs.model_fields
    file.write_text("max_running_request: 1\n")
    with pytest.raises(ConfigurationError, match="unknown key 'max_running_request'"):
        load_engine_args(file, SglangEngineArgs)


def test_only_what_is_given_goes_to_sglang() -> None:
    assert SglangEngineArgs().given() == {}
    args = SglangEngineArgs(context_length=99, dtype="float16", encoder_transformers="5.23.0")
    assert args.given() == {"context_length": 99}


def test_architectures_and_halves_that_are_not_served() -> None:
    engine = find_engine("sglang")
    engine.check("pd", {"model_type": "qwen2_vl"}, None)
    with pytest.raises(ConfigurationError, match=r"'gemma3'.*Triton"):
        engine.check("pd", {"model_type": "gemma3"}, None)
    with pytest.raises(ConfigurationError, match="--engine transformers"):
        engine.check("encode", {}, None)
    with pytest.raises(ConfigurationError, match="tp_size"):
        engine.follow(None)


def test_an_embedding_is_pickled_as_its_place_and_opened_as_the_same_memory() -> None:
    cache = MultimodalEmbeddingCacheManager(1 << 22)
    item = EncodedItem(torch.arange(128_000.0).reshape(1000, 128), EmbeddingMetadata(None, "text"))
    with stored(cache, "00" * 32, item) as lease:
        sent = pickle.dumps(hand_over(lease.handle()))
        assert len(sent) < 1000, "no bytes of it travel"
        opened = pickle.loads(sent)  # noqa: S301 - our own
        assert type(opened) is HandedOver
        assert torch.equal(opened, lease.tensor)
        lease.tensor[0, 0] = 7.0
        assert opened[0, 0] == 7.0, "the same memory"
        assert not opened.is_cpu, "or SGLang would copy it"
        assert type(opened[1:3]) is torch.Tensor, "what is computed from it is a tensor like any other"
        assert len(pickle.dumps(opened)) < 1000, "from a scheduler to the next one too"
    del opened
    cache.close()


def test_a_place_that_does_not_exist_is_an_error() -> None:
    nowhere = Handle(b"/nowhere", b"/torch_0_0_nowhere", 64, 0, torch.float32, (4, 4))
    with pytest.raises(Exception, match="shared memory"):
        pickle.loads(pickle.dumps(hand_over(nowhere)))  # noqa: S301 - our own


def test_runs_of_image_tokens() -> None:
    assert runs_of([1, 9, 9, 9, 1, 9, 9], 9, [3, 2]) == (((1, 3),), ((5, 6),))
    assert runs_of([9, 9, 9, 9], 9, [1, 3]) == (((0, 0),), ((1, 3),)), "side by side"
    assert runs_of([9, 1, 9, 9, 1, 9], 9, [3, 1]) == (((0, 0), (2, 3)), ((5, 5),)), "tokens in between"
    with pytest.raises(PlaceholderMismatchError, match=r"has 1 image tokens .* have 2 rows"):
        runs_of([9], 9, [2])


def output(tokens: list[int], reason: dict[str, Any] | None, **meta: Any) -> dict[str, Any]:
    common = {"finish_reason": reason, "prompt_tokens": 22, "cached_tokens": 4}
    return {"output_ids": tokens, "meta_info": common | meta}


def test_outputs() -> None:
    logprobs = {
        "output_token_logprobs": [(-0.5, 3, None), (-float("inf"), 4, None)],
        "output_top_logprobs": [[(-0.5, 3, None), (-1.5, 5, None)], [(-0.1, 6, None)]],
    }
    delta = delta_of(output([3, 4], {"type": "stop", "matched": 4}, **logprobs), 1, 1)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason, delta.choice) == ((3, 4), "stop", 1)
    assert (delta.prompt_tokens, delta.cached_tokens) == (22, 4)
    first, second = delta.logprobs
    assert (first.chosen.logprob, [each.token_id for each in first.likeliest]) == (-0.5, [3])
    assert second.chosen.logprob == -9999.0
    assert delta_of(output([], None), 0, None) is None
    with pytest.raises(GenerationError, match="every token"):
        delta_of(output([3, 5], None, **logprobs), 0, 1)
    with pytest.raises(GenerationError, match="could not finish"):
        delta_of(output([], {"type": "abort", "status_code": 500, "message": "no"}), 0, None)
