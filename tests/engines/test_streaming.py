"""Tokens come as they are computed; an answer that is not read any more costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.engines.conftest import Halves
from tests.engines.contract import chat_case, picture, reference_model
from tests.engines.decoding import Answer, ask, counting_tokens, read, text_request, together, until
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersGenerator
from trtllm_mm_cache.errors import IntegrityError

LONG = 3000
"""Tokens of an answer that takes longer than any test waits."""


def vocabulary(halves: Halves) -> int:
    return int(reference_model(halves.model_dir).get_input_embeddings().num_embeddings)


async def test_tokens_come_before_the_answer_is_complete(small: Halves) -> None:
    with counting_tokens(vocabulary(small)) as computed:
        stream = small.generator.generate(text_request(small, max_tokens=LONG), [])
        first = await anext(stream)
        assert len(first.token_ids) >= 1
        assert first.finish_reason is None
        assert computed.value < LONG
        await stream.aclose()


async def test_every_delta_counts_the_expanded_prompt(small: Halves) -> None:
    case = chat_case(small.model_dir, [picture(1, 120, 80)])
    lease = small.carry(case.items(""))[0]
    expected = len(case.request.token_ids) - 1 + lease.shape[0]
    async for delta in small.generator.generate(case.request, [lease]):
        assert delta.prompt_tokens == expected


async def test_closing_the_stream_stops_the_computation(small: Halves) -> None:
    with counting_tokens(vocabulary(small)) as computed:
        stream = small.generator.generate(text_request(small, max_tokens=LONG), [])
        await anext(stream)
        await stream.aclose()
        stopped_at = computed.value
        assert stopped_at < LONG
        await ask(small, max_tokens=3)
        assert computed.value == stopped_at + 3


async def test_cancelling_the_reader_stops_the_computation(small: Halves) -> None:
    with counting_tokens(vocabulary(small)) as computed:
        reader = asyncio.create_task(ask(small, max_tokens=LONG))
        await until(lambda: computed.value >= 3)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        stopped_at = computed.value
        assert stopped_at < LONG
        await ask(small, max_tokens=3)
        assert computed.value == stopped_at + 3


async def test_a_request_that_leaves_the_queue_is_never_computed(small: Halves) -> None:
    with counting_tokens(vocabulary(small)) as computed:
        running = small.generator.generate(text_request(small, max_tokens=LONG), [])
        await anext(running)
        waiting = asyncio.create_task(ask(small, max_tokens=LONG))
        behind = asyncio.create_task(ask(small, max_tokens=2))
        await until(lambda: computed.value >= 60)  # by then both are in the queue
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert computed.value < LONG, "leaving the queue waited for the request in front"
        await running.aclose()
        stopped_at = computed.value
        assert len((await behind).tokens) == 2
        assert computed.value <= stopped_at + 2


async def test_interleaved_requests_get_the_answers_they_get_alone(
    halves_of: Callable[[str], Halves],
) -> None:
    """Qwen's models keep position offsets between calls: they must not reach another request."""
    halves = halves_of("qwen2_5_vl")
    cases = [chat_case(halves.model_dir, [picture(seed, 60 + 30 * seed, 90)]) for seed in range(3)]
    cases.append(chat_case(halves.model_dir, []))
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    requests = [(replace(case.request, sampling=sampling), halves.carry(case.items(""))) for case in cases]
    alone = [await read(halves.generator.generate(*request)) for request in requests]
    assert len({tuple(answer.tokens) for answer in alone}) == len(alone)
    at_once = await together([read(halves.generator.generate(*request)) for request in requests])
    assert [answer.tokens for answer in at_once] == [answer.tokens for answer in alone]


async def test_the_event_loop_runs_while_the_model_computes(halves_of: Callable[[str], Halves]) -> None:
    halves = halves_of("qwen2_vl")
    request = text_request(halves, "What is it? " * 400, max_tokens=1)
    answer = asyncio.create_task(read(halves.generator.generate(request, [])))
    turns = 0
    while not answer.done():
        turns += 1
        await asyncio.sleep(0.001)
    assert (await answer).finish_reason == "length"
    assert turns > 20


async def test_close_ends_running_and_waiting_answers(small: Halves) -> None:
    generator = TransformersGenerator(small.model_dir, TransformersEngineArgs(device="cpu"))
    with counting_tokens(vocabulary(small)) as computed:
        request = text_request(small, max_tokens=LONG)
        readers = [asyncio.create_task(read(generator.generate(request, []))) for _ in range(3)]
        await until(lambda: computed.value >= 3)
        await generator.close()
        answers: list[Answer] = await together(readers)
        assert [answer.finish_reason for answer in answers] == ["cancelled"] * 3
        # Which one runs is decided by the threads that prepare them.
        assert sum(bool(answer.tokens) for answer in answers) == 1
        assert computed.value < LONG
    with pytest.raises(IntegrityError, match="closed"):
        await read(generator.generate(request, []))


async def test_a_failure_of_the_model_reaches_the_reader_after_its_tokens(
    small: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next request is served."""
    from transformers import TopKLogitsWarper

    calls = 0
    narrow = TopKLogitsWarper.__call__

    def failing(self: TopKLogitsWarper, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return narrow(self, *args)

    monkeypatch.setattr(TopKLogitsWarper, "__call__", failing)
    stream = small.generator.generate(text_request(small, temperature=1.0, top_k=5, seed=1), [])
    tokens = list((await anext(stream)).token_ids)
    await until(lambda: calls >= 4)
    await ask(small, max_tokens=1)  # its turn comes after the failure

    async def collect() -> None:
        async for delta in stream:
            tokens.extend(delta.token_ids)

    with pytest.raises(RuntimeError, match="out of memory"):
        await collect()
    assert len(tokens) == 3
    assert len((await ask(small)).tokens) == 12
