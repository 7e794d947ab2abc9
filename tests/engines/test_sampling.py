"""Which tokens are chosen, and where an answer ends."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.conftest import Halves
from tests.engines.contract import (
    chat_case,
    pictures,
    reference_inputs,
    reference_model,
    reference_processor,
)
from tests.engines.decoding import ask, read, text_request, together
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersGenerator
from trtllm_mm_cache.errors import InvalidRequestError


def decode(halves: Halves, tokens: list[int]) -> str:
    return str(reference_processor(halves.model_dir).tokenizer.decode(tokens))


async def test_max_tokens_ends_an_answer(small: Halves) -> None:
    for wanted in (1, 2, 7):
        answer = await ask(small, max_tokens=wanted)
        assert (len(answer.tokens), answer.finish_reason) == (wanted, "length")


async def test_greedy_without_temperature_and_at_zero(small: Halves) -> None:
    greedy = await ask(small)
    for same in ({"temperature": 0}, {"temperature": 1e-9}, {"temperature": 1.5, "top_k": 1}):
        assert (await ask(small, **same)).tokens == greedy.tokens, same
    assert (await ask(small, temperature=1.0, top_p=1e-6)).tokens == greedy.tokens


async def test_a_seed_decides_the_answer(small: Halves) -> None:
    by_seed = [(await ask(small, temperature=1.0, seed=seed)).tokens for seed in (1, 1, 2, -1, 2**64 - 1)]
    assert by_seed[0] == by_seed[1]
    assert by_seed[0] != by_seed[2]
    unseeded = [(await ask(small, temperature=1.0)).tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


async def test_requests_do_not_share_random_state(small: Halves) -> None:
    alone = (await ask(small, temperature=1.0, seed=5)).tokens
    before = torch.random.get_rng_state()
    answers = await together([ask(small, temperature=1.0, seed=seed) for seed in (5, None, 6, 5, None)])
    assert answers[0].tokens == answers[3].tokens == alone
    assert torch.equal(torch.random.get_rng_state(), before)


async def test_top_k_and_top_p_narrow_the_choice(small: Halves) -> None:
    logits = small.generator.prefill_logits(text_request(small), [])
    best = logits.argsort(descending=True).tolist()
    probabilities = logits.softmax(-1)[best].cumsum(-1)
    nucleus = best[: int((probabilities < 0.2).sum()) + 1]
    assert 2 < len(nucleus) < len(best) / 4
    first = {
        name: {
            (await ask(small, max_tokens=1, temperature=1.0, seed=seed, **narrow)).tokens[0]
            for seed in range(25)
        }
        for name, narrow in {"top_k": {"top_k": 2}, "top_p": {"top_p": 0.2}, "all": {"top_k": -1}}.items()
    }
    assert first["top_k"] == set(best[:2])
    assert first["top_p"] <= set(nucleus)
    assert not first["all"] <= set(nucleus)


async def test_stop_token_ids(small: Halves) -> None:
    free = (await ask(small)).tokens
    stop = free[4]
    answer = await ask(small, stop_token_ids=(stop,))
    assert answer.tokens == free[: free.index(stop) + 1]
    assert answer.finish_reason == "stop"


async def test_min_tokens_keeps_stop_tokens_away(small: Halves) -> None:
    free = (await ask(small)).tokens
    answer = await ask(small, stop_token_ids=(free[0],), min_tokens=6)
    assert len(answer.tokens) >= 6
    assert free[0] not in answer.tokens[:5]


async def test_stop_strings_end_the_answer_where_they_are_complete(small: Halves) -> None:
    sampled = {"temperature": 1.0, "seed": 3, "max_tokens": 80}
    free = (await ask(small, **sampled)).tokens
    texts = [decode(small, free[: length + 1]) for length in range(len(free))]
    pairs = [
        decode(small, free[position : position + 2])
        for position in range(10, len(free) - 1)
        if all(len(decode(small, [token])) > 1 for token in free[position : position + 2])
    ]
    stop = next(pair for pair in pairs if pair.isascii() and pair in texts[-2] and pair not in texts[8])
    end = next(length for length, text in enumerate(texts) if stop in text)
    assert 8 < end < len(free) - 1
    answer = await ask(small, **sampled, stop=("never said", stop))
    assert (answer.tokens, answer.finish_reason) == (free[: end + 1], "stop")
    # What was complete too early does not count later, though it is still among the newest tokens.
    later = await ask(small, **sampled, stop=(stop,), min_tokens=end + 2)
    assert len(later.tokens) > end + 2


@pytest.fixture
def with_eos(small: Halves, tmp_path: Path) -> Any:
    """Load the small model with other end-of-sequence tokens in its generation_config.json."""

    def load(eos_token_ids: list[int]) -> Halves:
        model_dir = tmp_path / "model"
        shutil.copytree(small.model_dir, model_dir)
        path = model_dir / "generation_config.json"
        defaults = {"temperature": 0.3, "do_sample": True, "repetition_penalty": 5.0, "top_k": 3}
        path.write_text(json.dumps(json.loads(path.read_text()) | defaults | {"eos_token_id": eos_token_ids}))
        args = TransformersEngineArgs(device="cpu")
        return replace(small, model_dir=model_dir, generator=TransformersGenerator(model_dir, args))

    return load


async def test_every_eos_token_of_the_model_ends_an_answer(small: Halves, with_eos: Any) -> None:
    free = (await ask(small, max_tokens=10)).tokens
    other = next(token for token in range(50) if token not in free)
    halves = with_eos([other, free[3]])
    answer = await ask(halves, max_tokens=10, ignore_eos=False)
    assert (answer.tokens, answer.finish_reason) == (free[: free.index(free[3]) + 1], "stop")
    # The model's own sampling defaults do not apply either: the request says nothing, so it is greedy.
    assert (await ask(halves, max_tokens=10, ignore_eos=True)).tokens == free
    longer = await ask(halves, max_tokens=10, ignore_eos=False, min_tokens=10)
    assert free[3] not in longer.tokens[:9]
    await halves.generator.close()


async def test_the_context_bounds_prompt_and_answer(small: Halves) -> None:
    case = chat_case(small.model_dir, pictures(1))
    lease = small.carry(case.items(""))[0]
    prompt_tokens = reference_inputs(case)["input_ids"].shape[1]
    args = TransformersEngineArgs(device="cpu", max_model_len=60)
    generator = TransformersGenerator(small.model_dir, args)
    for wanted in (None, 1000):
        request = replace(
            case.request, sampling=replace(case.request.sampling, max_tokens=wanted, ignore_eos=True)
        )
        answer = await read(generator.generate(request, [lease]))
        assert len(answer.tokens) + prompt_tokens == 60
        assert answer.finish_reason == "length"
    await generator.close()
    exact = TransformersEngineArgs(device="cpu", max_model_len=prompt_tokens)
    generator = TransformersGenerator(small.model_dir, exact)
    with pytest.raises(InvalidRequestError, match=f"{prompt_tokens} tokens"):
        await read(generator.generate(request, [lease]))
    await generator.close()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1, 13]),
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_p", [0.0, 1.1, float("nan")]),
        ("top_k", [-2]),
        ("seed", [2**64, -(2**63) - 1]),
        ("stop", [("",), ("a", "")]),
        ("presence_penalty", [-2.1, 2.1, float("nan")]),
        ("frequency_penalty", [-2.1, 2.1, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, 101.0, float("nan")]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("logit_bias", [{3: 100.5}, {3: float("nan")}, {-1: 1.0}, {10**6: 1.0}]),
        ("logprobs", [-1, 21]),
        ("prompt_logprobs", [0, 5, 21]),
        ("choices", [2]),
    ],
)
async def test_values_that_no_sampler_takes(small: Halves, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError, match="n: " if field == "choices" else field):
            await ask(small, **{field: value})


async def test_token_ids_outside_the_vocabulary(small: Halves) -> None:
    vocabulary = reference_model(small.model_dir).get_input_embeddings().num_embeddings
    for token_ids in ((), (1, vocabulary), (1, -1)):
        request = replace(text_request(small), token_ids=token_ids, prompt_text=None)
        with pytest.raises(InvalidRequestError, match=r"empty|vocabulary"):
            await read(small.generator.generate(request, []))
