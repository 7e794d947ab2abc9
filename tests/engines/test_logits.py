"""What bends the choice of tokens, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.engines.conftest import Halves
from tests.engines.contract import chat_case, pictures, reference_inputs, reference_model
from tests.engines.decoding import ask, read, text_request
from trtllm_mm_cache.engines.base import SamplingParams


def scores_after(halves: Halves, answer: list[int]) -> torch.Tensor:
    """Return the logits of each token of an answer, of the whole model over the prompt and the answer."""
    prompt = list(text_request(halves).token_ids)
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = reference_model(halves.model_dir)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 3.0, "top_k": 5, "seed": 4}], ids=["greedy", "drawn"]
)
async def test_logprobs_are_the_models_own(small: Halves, sampling: dict[str, float]) -> None:
    """Of the whole distribution: neither temperature nor cuts, bias or penalties show in them."""
    answer = await ask(small, logprobs=3, presence_penalty=1.0, logit_bias={7: 4.0}, **sampling)
    expected = torch.log_softmax(scores_after(small, answer.tokens), dim=-1)
    assert len(answer.logprobs) == len(answer.tokens) == 12
    for token, place, row in zip(answer.tokens, answer.logprobs, expected, strict=True):
        assert place.chosen.token_id == token
        assert place.chosen.logprob == pytest.approx(row[token].item(), abs=1e-4)
        values, ids = row.topk(3)
        assert [each.token_id for each in place.likeliest] == ids.tolist()
        assert [each.logprob for each in place.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


async def test_logprobs_of_the_chosen_token_alone_and_of_none(small: Halves) -> None:
    answer = await ask(small, logprobs=0)
    assert [place.likeliest for place in answer.logprobs] == [()] * 12
    assert answer.logprobs[0].chosen.token_id == answer.tokens[0]
    assert (await ask(small)).logprobs == []


async def test_logprobs_of_an_answer_about_images_and_beside_min_tokens(
    halves_of: Callable[[str], Halves],
) -> None:
    halves = halves_of("smolvlm")
    case = chat_case(halves.model_dir, pictures(2))
    leases = halves.carry(case.items(""))
    expected = torch.log_softmax(halves.generator.prefill_logits(case.request, leases), dim=-1)
    likely = expected.topk(2).indices.tolist()
    sampling = SamplingParams(max_tokens=2, min_tokens=2, stop_token_ids=tuple(likely), logprobs=2)
    request = text_request(halves)
    request = type(request)("r", case.request.token_ids, case.request.prompt_text, sampling)
    answer = await read(halves.generator.generate(request, leases))
    assert [each.token_id for each in answer.logprobs[0].likeliest] == likely, "what min_tokens bars is told"
    assert answer.tokens[0] not in likely


async def test_the_logarithm_of_zero_is_a_number(small: Halves) -> None:
    answer = await ask(small, logprobs=20, max_tokens=3)
    assert all(math.isfinite(each.logprob) for place in answer.logprobs for each in place.likeliest)


async def test_a_bias_moves_the_choice(small: Halves) -> None:
    free = (await ask(small)).tokens
    assert free[0] not in (await ask(small, logit_bias={free[0]: -100.0})).tokens
    wanted = next(token for token in range(50) if token not in free)
    assert (await ask(small, logit_bias={wanted: 100.0})).tokens == [wanted] * 12


async def test_penalties_are_those_of_openai_and_vllm(small: Halves) -> None:
    """Each next token is the best of the model's scores with the penalty taken off, as the APIs define it."""
    prompt = set(text_request(small).token_ids)
    for penalty in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4},
    ):
        answer = (await ask(small, max_tokens=40, **penalty)).tokens
        for place, scores in enumerate(scores_after(small, answer)):
            before = answer[:place]
            for token in prompt | set(before):
                factor = penalty.get("repetition_penalty", 1.0)
                scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
            for token in set(before):
                scores[token] -= penalty.get("frequency_penalty", 0.0) * before.count(token)
                scores[token] -= penalty.get("presence_penalty", 0.0)
            assert scores[answer[place]] == pytest.approx(scores.max().item(), abs=1e-4), (penalty, place)
        assert answer != (await ask(small, max_tokens=40)).tokens, (
            "a penalty that changes nothing shows nothing"
        )


async def test_penalties_over_a_prompt_with_images(halves_of: Callable[[str], Halves]) -> None:
    for architecture in ("gemma3", "qwen3_vl", "llava"):
        halves = halves_of(architecture)
        case = chat_case(halves.model_dir, pictures(1))
        leases = halves.carry(case.items(halves.generator.variant(1)))
        seen = reference_inputs(case)["input_ids"][0].unique()
        sampling = SamplingParams(max_tokens=1, repetition_penalty=100.0)
        request = type(case.request)("r", case.request.token_ids, case.request.prompt_text, sampling)
        scores = halves.generator.prefill_logits(case.request, leases)
        seen = seen[seen < len(scores)]
        factor = torch.where(scores[seen] > 0, 1 / 100, 100.0)
        scores[seen] = scores[seen] * factor
        answer = await read(halves.generator.generate(request, leases))
        assert answer.tokens == [int(scores.argmax())]


async def test_min_p_keeps_what_is_near_the_best(small: Halves) -> None:
    probabilities = small.generator.prefill_logits(text_request(small), []).softmax(-1)
    kept = set((probabilities >= 0.5 * probabilities.max()).nonzero().flatten().tolist())
    assert 1 < len(kept) < len(probabilities) / 4
    drawn = {
        (await ask(small, max_tokens=1, temperature=1.0, min_p=0.5, seed=seed)).tokens[0]
        for seed in range(40)
    }
    assert len(drawn) > 1
    assert drawn <= kept
