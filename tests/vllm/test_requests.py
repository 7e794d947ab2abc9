"""What a request may ask for, on the real engine, one field after another; and what never reaches it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engines.contract import chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.vllm.engine import Engine
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import Constraint, EncodedItem, GenerationRequest, SamplingParams
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidRequestError

pytestmark = pytest.mark.parametrize("engine", ["demo"], indirect=True)

HOT = SamplingParams(max_tokens=16, ignore_eos=True, temperature=2.0, seed=5, logprobs=5)


def text_request(engine: Engine, text: str = "Hello there") -> GenerationRequest:
    return chat_case(engine.model_dir, [], [text]).request


async def tokens_of(engine: Engine, sampling: SamplingParams) -> tuple[int, ...]:
    return (await engine.answer(text_request(engine), [], sampling)).tokens


async def test_greedy_is_the_likeliest_at_each_place_and_logprobs_are_as_many_as_asked(
    engine: Engine,
) -> None:
    answer = await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=3))
    assert [place.chosen.token_id for place in answer.logprobs] == list(answer.tokens)
    for place in answer.logprobs:
        assert len(place.likeliest) == 3
        assert place.chosen == place.likeliest[0]
        assert sorted(place.likeliest, key=lambda each: -each.logprob) == list(place.likeliest)
    none = await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=0))
    assert [place.likeliest for place in none.logprobs] == [()] * 8
    assert [place.chosen for place in none.logprobs] == [place.chosen for place in answer.logprobs]
    assert (await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=None))).logprobs == ()


async def test_a_seed_repeats_an_answer_and_another_one_does_not(engine: Engine) -> None:
    first = await tokens_of(engine, HOT)
    assert await tokens_of(engine, HOT) == first
    for seed in (6, -1, 2**64 - 2):
        other = await tokens_of(engine, replace(HOT, seed=seed))
        assert other != first
        assert await tokens_of(engine, replace(HOT, seed=seed)) == other


async def test_each_option_bends_the_choice(engine: Engine) -> None:
    free = await tokens_of(engine, HOT)
    bent: dict[str, Any] = {
        "top_k": 1,
        "top_p": 0.01,
        "min_p": 1.0,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 50.0,
        "logit_bias": {free[0]: -100.0},
    }
    answers = {name: await tokens_of(engine, replace(HOT, **{name: value})) for name, value in bent.items()}
    assert all(answer != free for answer in answers.values()), answers
    greedy = await tokens_of(engine, replace(GREEDY, max_tokens=16))
    for name in ("top_k", "top_p", "min_p"):
        assert answers[name] == greedy, f"{name} leaves one token at each place"
    assert answers["logit_bias"][0] != free[0]


async def test_ends(engine: Engine) -> None:
    request = text_request(engine)
    decode = engine.generator._check.expander._decode
    free = await engine.answer(request, [], replace(HOT, max_tokens=40))
    assert free.finish_reason == "length"
    token = free.tokens[5]
    ended = await engine.answer(request, [], replace(HOT, max_tokens=40, stop_token_ids=(token,)))
    assert (ended.finish_reason, ended.tokens) == ("stop", free.tokens[: free.tokens.index(token) + 1])
    late = await engine.answer(
        request, [], replace(HOT, max_tokens=40, stop_token_ids=(token,), min_tokens=9)
    )
    assert len(late.tokens) >= 9
    text = decode([free.tokens[3]]).strip()
    assert text
    stopped = await engine.answer(request, [], replace(HOT, max_tokens=40, stop=(text,)))
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)], "the stop string's tokens are emitted"
    assert text in decode(list(stopped.tokens))


async def test_structured_output(engine: Engine) -> None:
    fields = {"properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    decode = engine.generator._check.expander._decode
    schema = Constraint("json_schema", json.dumps({"type": "object", **fields}))
    sampling = SamplingParams(max_tokens=400, temperature=1.0, seed=3, constraint=schema)
    answer = await engine.answer(text_request(engine), [], sampling)
    assert answer.finish_reason == "stop"
    assert json.loads(decode(list(answer.tokens)).removesuffix("<|im_end|>"))["a"] in ("x", "y")
    pattern = replace(sampling, constraint=Constraint("regex", "(red|blue){2}"))
    answer = await engine.answer(text_request(engine), [], pattern)
    words = {first + second for first in ("red", "blue") for second in ("red", "blue")}
    assert decode(list(answer.tokens)).removesuffix("<|im_end|>") in words


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"choices": 2}, "n: with temperature 0"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"constraint": Constraint("regex", "a(")}, "structured output"),
    ],
)
async def test_sampling_that_is_refused(engine: Engine, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=None, **changes))


async def test_prompts_that_are_refused(engine: Engine) -> None:
    for token_ids, says in (
        ((), "empty"),
        ((10**6,), "outside the model's vocabulary"),
        ((5,) * 1024, "no room"),
    ):
        request = GenerationRequest("r", token_ids, None, GREEDY)
        with pytest.raises(InvalidRequestError, match=says):
            await engine.answer(request, [])


async def test_embeddings_that_do_not_fit_never_reach_vllm(engine: Engine) -> None:
    """A worker that got one of these would end the engine, and with it every request."""
    case = chat_case(engine.model_dir, [picture(1, 112, 112)])
    good = engine.encode(case.images[0])
    rows, width = good.tensor.shape
    for tensor in (
        torch.zeros(rows + 4, width, dtype=good.tensor.dtype),
        torch.zeros(rows, width // 2, dtype=good.tensor.dtype),
        torch.zeros(rows, width, dtype=torch.float32),
    ):
        with engine.lease(EncodedItem(tensor, good.metadata)) as lease, pytest.raises(EmbeddingMismatchError):
            await engine.answer(case.request, [lease])
    assert good.metadata.placeholder is not None
    gridless = EmbeddingMetadata(None, good.metadata.placeholder)
    with engine.lease(EncodedItem(good.tensor, gridless)) as lease, pytest.raises(EmbeddingMismatchError):
        await engine.answer(case.request, [lease])


async def test_an_image_that_vllm_could_never_hold_is_refused(engine: Engine) -> None:
    """vLLM would keep such a request waiting for ever."""
    case = chat_case(engine.model_dir, [picture(1, 112, 112)])
    most = engine.generator._prepare.limits.rows
    token = engine.generator._check.expander._tokenizer.convert_ids_to_tokens(
        engine.generator._check.expander.config.image_token_id
    )
    side = 2 * (most + 1)
    metadata = EmbeddingMetadata((1, 2, side), token * (most + 1))
    width = engine.encode(case.images[0]).tensor.shape[1]
    tensor = torch.zeros(most + 1, width, dtype=torch.float16)
    with (
        engine.lease(EncodedItem(tensor, metadata)) as lease,
        pytest.raises(InvalidRequestError, match=r"image 1: .*max_num_batched_tokens"),
    ):
        await engine.answer(case.request, [lease])


async def test_a_salt_parts_the_prefix_cache(engine: Engine) -> None:
    request = text_request(engine, "The same words for every tenant, and quite a few of them. " * 20)
    mine, theirs = replace(request, cache_salt="mine"), replace(request, cache_salt="theirs")
    assert (await engine.answer(mine, [])).cached_tokens == 0
    assert (await engine.answer(mine, [])).cached_tokens > 0
    assert (await engine.answer(theirs, [])).cached_tokens == 0
