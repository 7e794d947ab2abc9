"""A request's life in the engine: what it holds while it runs, how it ends, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from tests.engines.conftest import stored
from tests.engines.contract import (
    chat_case,
    picture,
    pictures,
)
from tests.engines.decoding import read, until
from tests.engines.trtllm.asking import GREEDY, answer_of, no_collector, request_of
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.cache.entry import CachedEmbedding, EmbeddingMetadata
from trtllm_mm_cache.errors import (
    EmbeddingMismatchError,
    GenerationError,
    InvalidRequestError,
    PlaceholderMismatchError,
)


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


async def test_a_cancelled_answer_is_aborted_and_leaves_nothing(qwen: TrtllmHalves) -> None:
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


async def test_several_images_for_llava_next_are_refused_by_name(llava: TrtllmHalves) -> None:
    case = chat_case(llava.model_dir, pictures(2))
    with pytest.raises(PlaceholderMismatchError, match="TensorRT-LLM takes 1 for this model"):
        await answer_of(llava, case, GREEDY, llava.carry(case.images))


async def test_embeddings_that_do_not_fit_are_named(qwen: TrtllmHalves, llava: TrtllmHalves) -> None:
    case = chat_case(qwen.model_dir, pictures(1))
    (foreign,) = llava.carry(pictures(1))
    encoded = qwen.encode(pictures(1)[0])
    without_grid = qwen.lease(replace(encoded, tensor=encoded.tensor + 1, metadata=EmbeddingMetadata()))
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
    forged = stored(qwen.cache, key, replace(encoded, tensor=encoded.tensor + 1))
    with pytest.raises(GenerationError):
        await answer_of(qwen, case, GREEDY, [forged])
    forged.release()
    qwen.cache.drop(key)
    assert qwen.cache.statistics().leased_entries == 0
