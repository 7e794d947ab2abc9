"""The contract over the peer: through handles in another process the answer is the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.engines.conftest import Halves
from tests.engines.contract import (
    Case,
    chat_case,
    picture,
    pictures,
    reference_inputs,
    reference_model,
    reference_processor,
)
from tests.engines.decoding import Answer, read, together
from tests.engines.trtllm.asking import DRAWN, GREEDY, answer_of, is_llava, request_of
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.engines.base import Constraint, EncodeItem, SamplingParams
from trtllm_mm_cache.engines.trtllm.logprobs import places_of
from trtllm_mm_cache.errors import GenerationError

HalvesOf = Callable[[str], Halves]


def images_for(halves: TrtllmHalves) -> list[Image.Image]:
    return pictures(1 if is_llava(halves) else 3)


async def expected_of(halves_of: HalvesOf, case: Case, sampling: SamplingParams) -> Answer:
    """What the transformers engine answers, which equals `generate(pixel_values)` to the last bit."""
    halves = halves_of(case.model_dir.name)
    # TensorRT-LLM puts the tokenizer's beginning-of-sequence token before a text with images.
    case = replace(case, add_special_tokens=case.model_dir.name == "llava_next")
    leases = halves.carry([EncodeItem(image) for image in case.images])
    return await read(halves.generator.generate(request_of(case, sampling), leases))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_answers_are_the_models_own(
    trtllm: TrtllmHalves, halves_of: HalvesOf, sampling: SamplingParams
) -> None:
    case = chat_case(trtllm.model_dir, images_for(trtllm))
    answer = await answer_of(trtllm, case, sampling, trtllm.carry(case.images))
    expected = await expected_of(halves_of, case, sampling)
    assert answer.tokens == expected.tokens
    assert (answer.finish_reason, answer.deltas > 1) == ("length", True)


async def test_another_image_or_another_order_gives_another_answer(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(3))
    first, second, third = qwen.carry(case.images)
    other = qwen.carry([picture(9, 120, 80)])[0]
    sampling = replace(DRAWN, max_tokens=150, temperature=4.0)
    answers = {
        tuple((await answer_of(qwen, case, sampling, leases)).tokens)
        for leases in ([first, second, third], [third, second, first], [other, second, third])
    }
    assert len(answers) == 3


async def test_text_alone_needs_no_handles(trtllm: TrtllmHalves, halves_of: HalvesOf) -> None:
    case = chat_case(trtllm.model_dir, [], ["Hello there"])
    halves = halves_of(trtllm.model_dir.name)
    expected = await read(halves.generator.generate(request_of(case, DRAWN), []))
    assert (await answer_of(trtllm, case, DRAWN, [])).tokens == expected.tokens


def test_the_tenants_salt_reaches_the_engines_kv_cache(qwen: TrtllmHalves) -> None:
    request = chat_case(qwen.model_dir, [], ["Hello"]).request
    for salt in ("one", None):
        prepared = qwen.generator._prepare(replace(request, cache_salt=salt), [])
        assert prepared.arguments["cache_salt"] == salt


def test_hashes_are_the_keys_and_handles_are_new_for_each_request(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(2))
    leases = qwen.carry(case.images)
    first, second = (qwen.generator._prepare(case.request, leases) for _ in range(2))
    one, other = (prepared.arguments["disaggregated_params"] for prepared in (first, second))
    for lease, numbers in zip(leases, one.multimodal_hashes, strict=True):
        assert b"".join(number.to_bytes(4, "big", signed=True) for number in numbers).hex() == lease.key
    assert one is not other
    assert one.multimodal_embedding_handles == other.multimodal_embedding_handles
    assert one.mrope_position_ids_handle != other.mrope_position_ids_handle, "each has its own buffer"
    for prepared in (first, second):
        qwen.generator._release(prepared)


def test_positions_handed_over_are_hugging_faces(qwen: TrtllmHalves) -> None:
    """The tiny model's tokens hardly depend on positions, so the handles' content is compared itself."""
    case = chat_case(qwen.model_dir, pictures(3))
    prepared = qwen.generator._prepare(case.request, qwen.carry(case.images))
    inputs = reference_inputs(case)
    expected, delta = reference_model(qwen.model_dir).model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    params = prepared.arguments["disaggregated_params"]
    assert prepared.positions is not None
    handed = [
        torch.empty(0, dtype=dtype).set_(
            prepared.positions.storage,
            handle["tensor_storage_offset"],
            handle["tensor_size"],
            handle["tensor_stride"],
        )
        for dtype, handle in (
            (torch.int64, params.mrope_position_ids_handle),
            (torch.int32, params.mrope_position_deltas_handle),
        )
    ]
    assert torch.equal(handed[0], expected)
    assert handed[1].tolist() == delta.tolist()
    qwen.generator._release(prepared)


async def test_the_same_image_twice_and_requests_at_once(qwen: TrtllmHalves, halves_of: HalvesOf) -> None:
    image = picture(5, 96, 160)
    case = chat_case(qwen.model_dir, [image, image])
    expected = await expected_of(halves_of, case, DRAWN)
    (lease,) = qwen.carry([image])
    answers = await together([answer_of(qwen, case, DRAWN, [lease, lease]) for _ in range(3)])
    assert [answer.tokens for answer in answers] == [expected.tokens] * 3


async def test_prompt_tokens_count_the_expanded_prompt(trtllm: TrtllmHalves) -> None:
    case = chat_case(trtllm.model_dir, images_for(trtllm))
    leases = trtllm.carry(case.images)
    stream = trtllm.generator.generate(request_of(case, SamplingParams(max_tokens=1)), leases)
    counts = {delta.prompt_tokens async for delta in stream}
    processor = reference_processor(trtllm.model_dir)
    text = {"add_special_tokens": is_llava(trtllm)}
    whole = processor(images=[case.images], text=case.prompt, text_kwargs=text)["input_ids"][0]
    assert counts == {len(whole)}


async def test_stop_strings_and_tokens_end_an_answer(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, [], ["Hello there"])
    free = await answer_of(qwen, case, replace(DRAWN, ignore_eos=False), [])
    tokenizer = reference_processor(qwen.model_dir).tokenizer
    # TensorRT-LLM looks for a stop string by its tokens, so take a token that its text gives back.
    token = next(
        one
        for one in free.tokens[2:]
        if tokenizer.encode(tokenizer.decode([one]), add_special_tokens=False) == [one]
    )
    stopped = await answer_of(qwen, case, replace(DRAWN, ignore_eos=False, stop_token_ids=(token,)), [])
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(token) + 1]
    text = tokenizer.decode([token])
    same = await answer_of(qwen, case, replace(DRAWN, ignore_eos=False, stop=(text,)), [])
    assert (same.finish_reason, same.tokens) == ("stop", stopped.tokens)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_logprobs_are_the_models_own(
    trtllm: TrtllmHalves, halves_of: HalvesOf, sampling: SamplingParams
) -> None:
    case = chat_case(trtllm.model_dir, images_for(trtllm))
    for wanted in (0, 4):
        asking = replace(sampling, logprobs=wanted)
        answer = await answer_of(trtllm, case, asking, trtllm.carry(case.images))
        expected = await expected_of(halves_of, case, asking)
        assert [place.chosen.token_id for place in answer.logprobs] == answer.tokens
        for place, own in zip(answer.logprobs, expected.logprobs, strict=True):
            assert place.chosen.logprob == pytest.approx(own.chosen.logprob, abs=1e-4)
            assert [each.token_id for each in place.likeliest] == [each.token_id for each in own.likeliest]
            assert len(place.likeliest) == wanted
    assert (await answer_of(trtllm, case, sampling, trtllm.carry(case.images))).logprobs == []


def test_a_token_without_a_log_probability_is_an_error() -> None:
    entry = {3: SimpleNamespace(logprob=-0.5, rank=1)}
    for tokens, entries in (([3, 3], [entry]), ([4], [entry]), ([3], [-0.5])):
        with pytest.raises(GenerationError, match="did not report"):
            places_of(tokens, entries, 1)


async def test_an_answer_is_json_of_the_schema(qwen: TrtllmHalves) -> None:
    fields = {"properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    constraint = Constraint("json_schema", json.dumps({"type": "object", **fields}))
    sampling = SamplingParams(max_tokens=300, temperature=1.0, seed=3, constraint=constraint)
    case = chat_case(qwen.model_dir, pictures(1))
    answer = await answer_of(qwen, case, sampling, qwen.carry(case.images))
    tokenizer = reference_processor(qwen.model_dir).tokenizer
    read = json.loads(tokenizer.decode(answer.tokens, skip_special_tokens=True))
    assert (answer.finish_reason, read["a"] in ("x", "y")) == ("stop", True)
