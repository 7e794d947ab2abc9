"""What a request may ask for, on the real engine, one field after another; and what never reaches it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engines.contract import chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.sglang.engine import Engine
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import Constraint, EncodedItem, GenerationRequest, SamplingParams
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidRequestError

pytestmark = pytest.mark.parametrize("engine", ["demo"], indirect=True)

HOT = SamplingParams(max_tokens=16, ignore_eos=True, temperature=2.0)
END = 500
"""The demo model's end of an answer. It says little before, and with `ignore_eos` nothing else after."""
ON_AND_ON = SamplingParams(max_tokens=40, logit_bias={END: -100.0})


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
        assert place.chosen.token_id == place.likeliest[0].token_id
        assert sorted(place.likeliest, key=lambda each: -each.logprob) == list(place.likeliest)
    none = await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=0))
    assert [place.likeliest for place in none.logprobs] == [()] * 8
    assert none.tokens == answer.tokens
    assert (await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=None))).logprobs == ()


async def test_logprobs_are_the_models_own_whatever_the_temperature(engine: Engine) -> None:
    """A bias towards one token makes the drawn answer the greedy one, with temperature still on."""
    greedy = await engine.answer(text_request(engine), [], replace(GREEDY, logprobs=5))
    hot = replace(GREEDY, logprobs=5, temperature=2.0, top_k=1)
    drawn = await engine.answer(text_request(engine), [], hot)
    assert drawn.tokens == greedy.tokens
    assert drawn.differs(greedy) < 1e-3


async def test_each_option_bends_the_choice(engine: Engine) -> None:
    greedy = await tokens_of(engine, replace(GREEDY, logprobs=None, max_tokens=16))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert await tokens_of(engine, replace(HOT, **narrow)) == greedy, f"{narrow} leaves one token"
    drawn = {await tokens_of(engine, HOT) for _ in range(3)}
    assert len(drawn) > 1, "a temperature draws"
    base = await tokens_of(engine, ON_AND_ON)
    bent: list[dict[str, Any]] = [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"logit_bias": {END: -100.0, base[0]: -100.0}},
    ]
    for change in bent:
        assert await tokens_of(engine, replace(ON_AND_ON, **change)) != base, change
    assert (await tokens_of(engine, replace(ON_AND_ON, **bent[-1])))[0] != base[0]


async def test_ends(engine: Engine) -> None:
    request = text_request(engine)
    decode = engine.generator._check.expander._decode
    plain = ON_AND_ON
    free = await engine.answer(request, [], plain)
    assert (free.finish_reason, len(free.tokens)) == ("length", 40)
    token = free.tokens[5]
    assert END not in free.tokens
    ended = await engine.answer(request, [], replace(plain, stop_token_ids=(token,)))
    assert (ended.finish_reason, ended.tokens) == ("stop", free.tokens[: free.tokens.index(token) + 1])
    late = await engine.answer(request, [], replace(plain, stop_token_ids=(token,), min_tokens=9))
    assert len(late.tokens) >= 9
    text = next(word for each in free.tokens[2:] if (word := decode([each]).strip()))
    stopped = await engine.answer(request, [], replace(plain, stop=(text,)))
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)], "the stop string's tokens are emitted"
    assert text in decode(list(stopped.tokens))


async def test_structured_output(engine: Engine) -> None:
    fields = {"properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    decode = engine.generator._check.expander._decode
    schema = Constraint("json_schema", json.dumps({"type": "object", **fields}))
    sampling = SamplingParams(max_tokens=400, temperature=1.0, constraint=schema)
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
        ({"seed": 3, "temperature": 1.0}, "seed: "),
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


async def test_the_longest_prompt_that_is_taken_is_answered(engine: Engine) -> None:
    context = engine.generator._prepare.place.context
    request = GenerationRequest("r", (5,) * (context - 1), None, GREEDY)
    answer = await engine.answer(request, [], replace(GREEDY, max_tokens=None))
    assert (answer.prompt_tokens, len(answer.tokens), answer.finish_reason) == (context - 1, 1, "length")


async def test_embeddings_that_do_not_fit_never_reach_sglang(engine: Engine) -> None:
    """SGLang itself would answer a prompt with too few image tokens wrongly, and without an error."""
    case = chat_case(engine.model_dir, [picture(1, 84, 84)])
    good = engine.encode(case.images[0])
    rows, width = good.tensor.shape
    for tensor in (
        torch.zeros(rows + 4, width, dtype=good.tensor.dtype),
        torch.zeros(rows, width // 2, dtype=good.tensor.dtype),
        torch.zeros(rows, width, dtype=torch.float16),
    ):
        with engine.lease(EncodedItem(tensor, good.metadata)) as lease, pytest.raises(EmbeddingMismatchError):
            await engine.answer(case.request, [lease])
    assert good.metadata.placeholder is not None
    gridless = EmbeddingMetadata(None, good.metadata.placeholder)
    with engine.lease(EncodedItem(good.tensor, gridless)) as lease, pytest.raises(EmbeddingMismatchError):
        await engine.answer(case.request, [lease])
