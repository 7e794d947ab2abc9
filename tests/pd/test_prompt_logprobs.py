"""Log probabilities of the prompt at a PD worker: counted before the engine is asked, sent as Dynamo's do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dynamo.runtime import Context

from tests.pd.bench import ROWS, Bench, admit_all, image_url
from tests.pd.test_answer import PeerGenerator, refusal, request
from trtllm_mm_cache.engines.base import PromptLogprobs, TokenDelta
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.runtime.generation import MARK, FrontendMark
from trtllm_mm_cache.settings import PdSettings

MOST = 200
TOKENS = 3000


@pytest.fixture
def generator() -> PeerGenerator:
    return PeerGenerator()


@pytest.fixture
def worker(bench: Bench, generator: PeerGenerator) -> PdWorker:
    settings = PdSettings(model_path="m", max_prompt_logprobs=MOST)
    return PdWorker(generator, bench.resolver, bench.metrics, settings, admit_all)


def told(tokens: int, width: int) -> PromptLogprobs:
    """Return what an engine says of a prompt of so many tokens."""
    count = (tokens - 1) * width
    return PromptLogprobs(width, range(count), [-each / 8 for each in range(count)], [5] * count)


def asking(*images: str, tokens: int = 1, **options: Any) -> dict[str, Any]:
    payload = request(*images) | {"token_ids": [1] * tokens}
    return payload | {"output_options": options, "extra_args": {MARK: FrontendMark().model_dump()}}


async def outputs_of(worker: PdWorker, payload: Any) -> list[dict[str, Any]]:
    return [output async for output in worker.handle(payload, Context()) if output]


async def test_our_frontend_gets_them_in_pieces_before_the_first_token_and_dynamos_in_one(
    worker: PdWorker, generator: PeerGenerator
) -> None:
    generator.deltas = (TokenDelta((7,), TOKENS, "stop", prompt_logprobs=told(TOKENS, 3)),)
    payload = asking(prompt_logprobs=2)
    items, *pieces, last = await outputs_of(worker, payload)
    assert "items" in items
    positions = [each for piece in pieces for each in piece["engine_data"]["prompt_logprobs"]]
    assert len(positions) == TOKENS
    assert all(3 * len(piece["engine_data"]["prompt_logprobs"]) <= 4096 for piece in pieces)
    assert positions[:2] == [
        None,
        {
            "0": {"logprob": 0, "rank": 5},
            "1": {"logprob": -0.125, "rank": 5},
            "2": {"logprob": -0.25, "rank": 5},
        },
    ]
    assert (last["token_ids"], "engine_data" in last) == ([7], False)
    whole, last = await outputs_of(worker, {**payload, "extra_args": {}})
    assert whole == {"token_ids": [], "engine_data": {"prompt_logprobs": positions}}
    assert last["token_ids"] == [7]


@pytest.mark.parametrize(
    ("tokens", "asked", "choices", "refused"),
    [(40, 4, 1, False), (41, 4, 1, True), (20, 4, 2, False), (20, 4, 3, True), (MOST, 0, 1, False)],
)
async def test_the_prompts_tokens_are_counted_with_its_entries_and_choices(
    worker: PdWorker, bench: Bench, tokens: int, asked: int, choices: int, refused: bool
) -> None:
    payload = asking(tokens=tokens, prompt_logprobs=asked) | {"sampling_options": {"n": choices}}
    *_, last = await outputs_of(worker, payload)
    if not refused:
        assert last["finish_reason"] == "stop"
        return
    assert last["error"]["code"] == "invalid_request"
    assert f"prompt_logprobs: {tokens} tokens" in last["error"]["message"]
    assert f"more than the {MOST}" in last["error"]["message"]
    await bench.nothing_held()


async def test_an_image_counts_with_its_rows(worker: PdWorker, bench: Bench) -> None:
    """One placeholder stands for 16 tokens: 199 of text are not too many, with an image they are."""
    asked = {"prompt_logprobs": 0}
    within = MOST - ROWS + 1
    *_, last = await outputs_of(worker, asking(image_url(), tokens=within, **asked))
    assert last["finish_reason"] == "stop"
    *_, last = await outputs_of(worker, asking(image_url(), tokens=within + 1, **asked))
    assert f"{MOST + 1} tokens" in last["error"]["message"]
    await bench.nothing_held()


async def test_a_few_at_a_time(worker: PdWorker, generator: PeerGenerator, bench: Bench) -> None:
    generator.stalls_after = 1
    running = [worker.handle(asking(prompt_logprobs=1), Context()) for _ in range(8)]
    for each in running:
        assert "items" in await anext(each)
        assert (await anext(each))["token_ids"] == [1]
    *_, last = await outputs_of(worker, asking(prompt_logprobs=1))
    assert last["error"]["code"] == "overloaded"
    generator.stalls_after = 0
    *_, last = await outputs_of(worker, asking())
    assert last["finish_reason"] == "stop", "others go on"
    for each in running:
        await each.aclose()
    async with asyncio.timeout(10):
        while True:
            *_, last = await outputs_of(worker, asking(prompt_logprobs=1))
            if "error" not in last:
                break
            await asyncio.sleep(0.01)
    await bench.nothing_held()


async def test_none_at_all_where_the_operator_says_so(bench: Bench, generator: PeerGenerator) -> None:
    settings = PdSettings(model_path="m", max_prompt_logprobs=0)
    worker = PdWorker(generator, bench.resolver, bench.metrics, settings, admit_all)
    (last,) = await outputs_of(worker, asking(prompt_logprobs=0) | {"extra_args": {}})
    assert refusal(last)[0] == "InvalidRequest"
    assert "prompt_logprobs: this server does not report them" in refusal(last)[1]
    *_, last = await outputs_of(worker, asking())
    assert last["finish_reason"] == "stop"
