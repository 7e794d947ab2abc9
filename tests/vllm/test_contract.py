"""The contract: from an embedding in the arena vLLM answers what it answers from the image's pixels.

To the bit where its own tower made the embedding, and up to rounding where transformers' did. A random model
can be blind to its images, so each comparison has one beside it that must differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.engines.contract import Case, chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.vllm.engine import Answer, Engine
from trtllm_mm_cache.engines.base import EncodedItem

TOWERS_DIFFER = {"internvl": 0.01, "idefics3": 0.05}
"""How far log probabilities may lie apart where more differs than rounding: torchvision resizes images for
vLLM, PIL for our encoder."""

FILLING = "Some words that stand between one image and another, and then some more of them. " * 3


def case_of(engine: Engine, *seeds: int, filling: str = "") -> Case:
    """Return a chat with an image for each seed, all of one size."""
    images = [picture(seed, 112, 112) for seed in seeds]
    texts = ["Look:\n", *[f"\n{filling}and this:\n"] * (len(seeds) - 1), f"\n{filling}What is it?"]
    return chat_case(engine.model_dir, images, texts)


async def same_tower(engine: Engine, case: Case) -> tuple[Answer, list[EncodedItem]]:
    """Return vLLM's answer from pixels, and its own tower's embeddings with what our encoder says of them."""
    answer, tensors = await engine.from_pixels(case)
    described = [engine.encode(image).metadata for image in case.images]
    return answer, [EncodedItem(*each) for each in zip(tensors, described, strict=True)]


async def test_an_answer_from_the_arena_is_vllms_own_to_the_bit(engine: Engine) -> None:
    case, other_case = case_of(engine, 1), case_of(engine, 2)
    expected, (own,) = await same_tower(engine, case)
    other_expected, (other,) = await same_tower(engine, other_case)
    answer = await engine.answer(case.request, [engine.lease(own)])
    assert answer.prompt_tokens == expected.prompt_tokens, "expanded as vLLM's own processor does"
    assert answer.differs(expected) == 0
    # Controls: the other image's answer is its own, and it is another one.
    swapped = await engine.answer(case.request, [engine.lease(other)])
    assert swapped.differs(other_expected) == 0
    assert swapped.differs(expected) > 10 * engine.rounding


async def test_from_transformers_tower_it_is_the_same_up_to_rounding(engine: Engine) -> None:
    case = case_of(engine, 1)
    expected, _ = await engine.from_pixels(case)
    answer = await engine.answer(case.request, [engine.lease(engine.encode(case.images[0]))])
    allowed = TOWERS_DIFFER.get(engine.model_dir.name, engine.rounding)
    assert answer.differs(expected) < allowed
    other = await engine.answer(case.request, [engine.lease(engine.encode(picture(2, 112, 112)))])
    assert other.differs(expected) > 10 * allowed


async def test_two_images_in_a_prompt_that_is_computed_in_chunks(engine: Engine) -> None:
    """The prompt has more tokens than a step, so images lie behind and across the edges of steps."""
    case = case_of(engine, 1, 2, filling=FILLING)
    expected, both = await same_tower(engine, case)
    answer = await engine.answer(case.request, [engine.lease(item) for item in both])
    assert answer.prompt_tokens == expected.prompt_tokens > 2 * 96
    assert answer.differs(expected) == 0
    swapped = await engine.answer(case.request, [engine.lease(item) for item in reversed(both)])
    assert swapped.differs(expected) > 10 * engine.rounding


async def test_with_and_without_vllms_own_caches_it_is_the_same(engine: Engine) -> None:
    case = case_of(engine, 3, filling=FILLING)
    lease = engine.lease(engine.encode(case.images[0]))
    await engine.forget()
    first = await engine.answer(case.request, [lease])
    again = await engine.answer(case.request, [lease])
    assert (first.cached_tokens, again.cached_tokens) > (0, 0)
    assert first.cached_tokens == 0
    assert again.differs(first) < engine.rounding
    other = engine.lease(engine.encode(picture(4, 112, 112)))
    uncached = await engine.answer(case.request, [other])
    assert uncached.cached_tokens < again.cached_tokens, "another key shares only the text before the image"
    assert uncached.differs(first) > 10 * engine.rounding


async def test_one_image_twice_takes_one_handle(engine: Engine) -> None:
    case = case_of(engine, 5, 5)
    expected, (one, another) = await same_tower(engine, case)
    assert torch.equal(one.tensor, another.tensor)
    lease = engine.lease(one)
    answer = await engine.answer(case.request, [lease, lease])
    assert answer.differs(expected) == 0
    other = engine.lease(engine.encode(picture(6, 112, 112)))
    assert (await engine.answer(case.request, [lease, other])).differs(expected) > 10 * engine.rounding


async def test_two_choices_are_drawn_each_for_itself(engine: Engine) -> None:
    case = case_of(engine, 6, filling=FILLING)
    lease = engine.lease(engine.encode(case.images[0]))
    drawn = replace(GREEDY, temperature=2.0, seed=7, choices=2, max_tokens=24)
    first, second = await engine.answers(case.request, [lease], drawn)
    assert (len(first.tokens), len(second.tokens)) == (24, 24)
    assert first.tokens != second.tokens
    await engine.forget()
    again = await engine.answers(case.request, [lease], drawn)
    assert [answer.tokens for answer in again] == [first.tokens, second.tokens]


async def test_text_alone(engine: Engine) -> None:
    case = chat_case(engine.model_dir, [], ["Hello there"])
    expected, _ = await engine.from_pixels(case)
    assert (await engine.answer(case.request, [])).differs(expected) == 0
