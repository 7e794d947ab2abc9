"""Log probabilities of the prompt, from an embedding in the arena: those that vLLM has from pixels."""

from __future__ import annotations

from dataclasses import replace

from tests.engines.answers import Answer
from tests.engines.with_tower import GREEDY
from tests.vllm.engine import Engine
from tests.vllm.test_contract import FILLING, case_of, same_tower
from trtllm_mm_cache.engines.base import PromptLogprobs

MOST = 3
ASKED = replace(GREEDY, prompt_logprobs=MOST)


def of(answer: Answer) -> PromptLogprobs:
    """Return what was said of the prompt, which must be of all its tokens but the first."""
    told = answer.prompt_logprobs
    assert told is not None
    assert told.width == MOST + 1
    assert len(told.token_ids) == len(told.ranks) == told.width * (answer.prompt_tokens - 1)
    return told


def differs_from(one: PromptLogprobs, another: PromptLogprobs) -> int:
    """Return the first position of the prompt at which they differ."""
    assert (one.width, len(one.logprobs)) == (another.width, len(another.logprobs))
    pairs = enumerate(zip(one.logprobs, another.logprobs, strict=True))
    return 1 + next(index for index, (mine, theirs) in pairs if mine != theirs) // one.width


async def test_they_are_vllms_own_to_the_bit_and_another_images_are_not(engine: Engine) -> None:
    """The prompt is computed in several steps, and then once more though vLLM has it in its caches."""
    case, other_case = case_of(engine, 1, filling=FILLING), case_of(engine, 2, filling=FILLING)
    expected, _ = await engine.from_pixels(case, prompt_logprobs=MOST, flat_logprobs=True)
    _, (own,) = await same_tower(engine, case)
    _, (other,) = await same_tower(engine, other_case)
    lease = engine.lease(own)
    for _ in range(2):
        answer = await engine.answer(case.request, [lease], ASKED)
        assert answer.cached_tokens == 0, "what is not computed has no log probabilities"
        assert answer.differs(expected) == 0
        assert of(answer) == of(expected)
    swapped = of(await engine.answer(case.request, [engine.lease(other)], ASKED))
    image_token = engine.generator._prepare.expander.config.image_token_id
    own_tokens = [case.request.token_ids[0], *of(expected).token_ids[:: MOST + 1]]
    first_row = own_tokens.index(image_token)
    assert own_tokens[first_row + 1] == image_token, "the prompt is told with its images expanded"
    assert differs_from(swapped, of(expected)) == first_row + 1, (
        "what comes before an image is not told by it"
    )


async def test_of_several_choices_they_are_said_once(engine: Engine) -> None:
    case = case_of(engine, 3, filling=FILLING)
    lease = engine.lease(engine.encode(case.images[0]))
    drawn = replace(ASKED, temperature=2.0, seed=7, choices=2)
    first, second = await engine.answers(case.request, [lease], drawn)
    (told,) = [each for each in (first.prompt_logprobs, second.prompt_logprobs) if each is not None]
    assert told == of(await engine.answer(case.request, [lease], ASKED))


async def test_a_prompt_of_one_token_has_nothing_to_say(engine: Engine) -> None:
    request = replace(case_of(engine, 1).request, token_ids=(5,), prompt_text=None)
    told = (await engine.answer(request, [], ASKED)).prompt_logprobs
    assert told == PromptLogprobs(MOST + 1, [], [], [])
