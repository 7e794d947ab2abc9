"""Log probabilities of the prompt, from a PD worker's messages to the client: whole, and few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.frontend.serving import DEADLINE_S, MODEL, PeerPdWorkers, chat, serving, token_messages
from trtllm_mm_cache.frontend.prompt import Prompts

CHAT = "/v1/chat/completions"
AT_A_TIME = 8


@pytest.fixture(scope="session")
def prompts(prompts_of: Callable[[str], Prompts]) -> Prompts:
    return prompts_of("qwen2_vl")


def piece(*positions: Any) -> dict[str, Any]:
    return {"token_ids": [], "engine_data": {"prompt_logprobs": list(positions)}}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_they_are_asked_for_and_come_whole(prompts: Prompts, path: str) -> None:
    (token,) = prompts.backend.encode("cat", add_special_tokens=False).ids[:1]
    entry = {str(token): {"logprob": -0.5, "rank": 1}}
    workers = PeerPdWorkers([piece(None, entry), piece(entry), *token_messages(prompts, "A cat sat")])
    asked = chat() if path == CHAT else {"model": MODEL, "prompt": "Hello"}
    async with serving(prompts, workers) as up:
        answer = (await up.client.post(path, json={**asked, "prompt_logprobs": 0})).json()
        assert workers.asked[0]["output_options"]["prompt_logprobs"] == 0
        await up.client.post(path, json=asked)
        assert workers.asked[1]["output_options"]["prompt_logprobs"] is None
    told = answer if path == CHAT else answer["choices"][0]
    decoded = {str(token): {"logprob": -0.5, "rank": 1, "decoded_token": prompts.backend.decode([token])}}
    assert told["prompt_logprobs"] == [None, decoded, decoded]
    assert answer["usage"]["completion_tokens"] == len(prompts.backend.encode("A cat sat").ids)


async def test_beyond_a_few_at_a_time_it_is_a_503_and_others_go_on(prompts: Prompts) -> None:
    gate = asyncio.Event()
    workers = PeerPdWorkers([gate, piece(None), *token_messages(prompts, "A cat")])
    async with serving(prompts, workers) as up:
        first = [
            asyncio.create_task(up.client.post(CHAT, json=chat(prompt_logprobs=1))) for _ in range(AT_A_TIME)
        ]
        async with asyncio.timeout(DEADLINE_S):
            while len(workers.asked) < AT_A_TIME:
                await asyncio.sleep(0.01)
        refused = await up.client.post(CHAT, json=chat(prompt_logprobs=1))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "prompt_logprobs" in refused.json()["error"]["message"]
        assert up.count("refused_total", what="prompt_logprobs") == 1
        plain = asyncio.create_task(up.client.post(CHAT, json=chat()))
        gate.set()
        answers: list[httpx2.Response] = [*await asyncio.gather(*first), await plain]
        assert {answer.status_code for answer in answers} == {200}
        later = await up.client.post(CHAT, json=chat(prompt_logprobs=1))
    assert later.status_code == 200, "their places are free again"
