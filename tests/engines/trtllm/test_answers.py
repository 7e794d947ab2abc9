"""The contract over the peer: through handles in another process the answer is the model's own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

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
from tests.engines.decoding import Answer, read, together, until
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease
from trtllm_mm_cache.engines.base import EncodeItem, GenerationRequest, SamplingParams
from trtllm_mm_cache.errors import (
    EmbeddingMismatchError,
    GenerationError,
    InvalidRequestError,
    PlaceholderMismatchError,
)

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=24, ignore_eos=True, temperature=20.0, seed=20261124)
"""Drawn at a heat at which the whole distribution of every step decides: tells more than greedy tokens."""

HalvesOf = Callable[[str], Halves]


def is_llava(halves: TrtllmHalves) -> bool:
    return halves.model_dir.name == "llava_next"


def images_for(halves: TrtllmHalves) -> list[Image.Image]:
    return pictures(1 if is_llava(halves) else 3)


def request_of(case: Case, sampling: SamplingParams) -> GenerationRequest:
    return replace(case.request, sampling=sampling)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def answer_of(
    halves: TrtllmHalves, case: Case, sampling: SamplingParams, leases: Sequence[Lease]
) -> Answer:
    return await read(halves.generator.generate(request_of(case, sampling), leases))


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
        qwen.generator._give_back(prepared)


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
    qwen.generator._give_back(prepared)


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


async def test_a_request_under_way_keeps_its_entry_while_others_need_room(qwen: TrtllmHalves) -> None:
    """The peer reads the bytes again at the end and fails the request if they have changed."""
    case = chat_case(qwen.model_dir, pictures(1))
    (lease,) = qwen.carry(case.images)
    key = lease.key
    stream = qwen.generator.generate(request_of(case, replace(GREEDY, max_tokens=300)), [lease])
    await anext(stream)
    lease.release()
    filler = CachedEmbedding(lease_sized(qwen))
    for number in range(40):
        qwen.cache.set(f"filler {number}", filler)
    assert qwen.cache.peek(key)
    answer = await read(stream)
    assert answer.finish_reason == "length"
    for number in range(40, 80):
        qwen.cache.set(f"filler {number}", filler)
    assert not qwen.cache.peek(key), "the lease must end with the answer"
    qwen.cache.clear()


def lease_sized(halves: TrtllmHalves) -> object:
    return torch.zeros(halves.cache.capacity_bytes // 16, dtype=torch.uint8)


async def test_an_answer_given_up_is_aborted_and_leaves_nothing(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(1))
    leases = qwen.carry(case.images)
    long = request_of(case, replace(GREEDY, max_tokens=3000))
    stream = qwen.generator.generate(long, leases)
    await anext(stream)
    started = asyncio.get_running_loop().time()
    await stream.aclose()
    # 3,000 tokens would take much longer; what comes next is answered at once, so nothing computes on.
    await answer_of(qwen, case, GREEDY, leases)
    assert asyncio.get_running_loop().time() - started < 10
    leases[0].release()
    assert qwen.cache.statistics().leased_entries == 0


async def test_a_cancelled_reader_leaves_nothing(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(1))
    (lease,) = qwen.carry(case.images)
    seen = []

    async def read_on() -> None:
        async for delta in qwen.generator.generate(
            request_of(case, replace(GREEDY, max_tokens=3000)), [lease]
        ):
            seen.append(delta)

    task = asyncio.create_task(read_on())
    await until(lambda: bool(seen))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    lease.release()
    await until(lambda: qwen.cache.statistics().leased_entries == 0)


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


async def test_several_images_for_llava_next_are_refused_by_name(llava: TrtllmHalves) -> None:
    case = chat_case(llava.model_dir, pictures(2))
    with pytest.raises(PlaceholderMismatchError, match="TensorRT-LLM takes 1 for this model"):
        await answer_of(llava, case, GREEDY, llava.carry(case.images))


async def test_embeddings_that_do_not_fit_are_named(qwen: TrtllmHalves, llava: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(1))
    (foreign,) = llava.carry(pictures(1))
    encoded = qwen.encode(pictures(1)[0])
    without_grid = qwen.lease(replace(encoded, tensor=encoded.tensor + 1, metadata={}))
    other_rows = qwen.lease(replace(encoded, tensor=encoded.tensor[:-1] + 2))
    for lease, says in ((foreign, "takes"), (without_grid, "no grid"), (other_rows, "does not give")):
        with pytest.raises(EmbeddingMismatchError, match=says):
            await answer_of(qwen, case, GREEDY, [lease])
        lease.release()
    with no_collector():  # nothing may wait for it: an error must not keep an embedding in the cache
        await until(lambda: not qwen.cache.statistics().leased_entries)
        await until(lambda: not llava.cache.statistics().leased_entries)


async def test_a_prompt_without_room_for_an_answer_is_refused(qwen: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, [], ["word " * 5000])
    with pytest.raises(InvalidRequestError, match="no room left for an answer"):
        await answer_of(qwen, case, GREEDY, [])


async def test_what_the_engine_refuses_is_the_clients_to_know(qwen: TrtllmHalves) -> None:
    """max_num_tokens without chunked prefill is the engine's own limit: its own words reach the client."""
    case = chat_case(qwen.model_dir, [], ["word " * 300])
    llm = qwen.generator._llm
    before, llm._max_num_tokens = llm._max_num_tokens, 100
    try:
        with pytest.raises(InvalidRequestError, match="should not exceed max_num_tokens"):
            await answer_of(qwen, case, GREEDY, [])
    finally:
        llm._max_num_tokens = before


async def test_a_hash_that_stands_for_other_bytes_fails_the_request(qwen: TrtllmHalves) -> None:
    """Shows that the peer's guard against shared KV blocks works: our keys never get there by themselves."""
    case = chat_case(qwen.model_dir, [picture(11, 64, 64)])
    encoded = qwen.encode(case.images[0])
    lease = qwen.lease(encoded)
    await answer_of(qwen, case, GREEDY, [lease])
    key = lease.key
    lease.release()
    qwen.cache.set(key, CachedEmbedding(encoded.tensor + 1, metadata=encoded.metadata))
    forged = qwen.cache.lease(key)
    assert forged is not None
    with pytest.raises(GenerationError):
        await answer_of(qwen, case, GREEDY, [forged])
    forged.release()
    qwen.cache.drop(key)
    assert qwen.cache.statistics().leased_entries == 0
