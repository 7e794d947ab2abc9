"""The contract: from an embedding in the arena SGLang answers what it answers from the image's pixels.

Up to rounding: transformers' tower made the embedding, and SGLang's own tower sees the pixels. A random model
can be blind to its images, so each comparison has one beside it that must differ.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from tests.engines.contract import Case, chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.sglang.engine import ROUNDING, Engine
from tests.sglang.models import LANGUAGE_PART

FILLING = "Some words that stand between one image and another, and then some more of them. " * 3


def image_of(engine: Engine, seed: int) -> Image.Image:
    """Return an image; Qwen's of a size at which no processor resizes, as each does it in its own way."""
    if engine.model_dir.name in LANGUAGE_PART:
        return picture(seed, 112, 112)
    side = 3 * 2 * engine.generator._check.expander.config.vision_config.patch_size
    return picture(seed, side, side)


def case_of(engine: Engine, *seeds: int, filling: str = "") -> Case:
    """Return a chat with an image for each seed."""
    images = [image_of(engine, seed) for seed in seeds]
    texts = ["Look:\n", *[f"\n{filling}and this:\n"] * (len(seeds) - 1), f"\n{filling}What is it?"]
    return chat_case(engine.model_dir, images, texts)


async def test_an_answer_from_the_arena_is_sglangs_own(engine: Engine) -> None:
    case = case_of(engine, 1)
    expected = await engine.from_pixels(case)
    with (
        engine.lease(engine.encode(case.images[0])) as lease,
        engine.lease(engine.encode(image_of(engine, 2))) as other,
    ):
        answer = await engine.answer(case.request, [lease])
        assert answer.prompt_tokens == expected.prompt_tokens, "expanded as SGLang's own processor does"
        print(f"largest difference of a log probability: {answer.differs(expected):.1e}")
        assert answer.differs(expected) < ROUNDING
        # Controls: the other image's answer is its own, and it is another one.
        swapped = await engine.answer(case.request, [other])
        assert swapped.differs(expected) > 10 * ROUNDING
        assert swapped.differs(await engine.from_pixels(case_of(engine, 2))) < ROUNDING


async def test_two_and_three_images_in_prompts_that_are_computed_in_chunks(engine: Engine) -> None:
    """The prompt has more tokens than a step, so images lie behind and across the edges of steps."""
    for seeds in ((1, 2), (3, 1, 2)):
        case = case_of(engine, *seeds, filling=FILLING)
        expected = await engine.from_pixels(case)
        leases = [engine.lease(engine.encode(image, len(seeds))) for image in case.images]
        answer = await engine.answer(case.request, leases)
        assert answer.prompt_tokens == expected.prompt_tokens > 2 * 96
        assert answer.differs(expected) < ROUNDING
        swapped = await engine.answer(case.request, leases[::-1])
        assert swapped.differs(expected) > 10 * ROUNDING
        for lease in leases:
            lease.release()


async def test_the_prefix_cache_knows_an_image_by_its_key(engine: Engine) -> None:
    """Images of one size in one text: an equal key is an equal prefix, and no other is."""
    case = case_of(engine, 3, filling=FILLING)
    first_item, other_item = engine.encode(case.images[0]), engine.encode(image_of(engine, 4))
    with engine.lease(first_item, "first") as lease, engine.lease(other_item, "other") as other:
        await engine.forget()
        first = await engine.answer(case.request, [lease])
        again = await engine.answer(case.request, [lease])
        changed = await engine.answer(case.request, [other])
        assert first.cached_tokens == 0
        assert again.cached_tokens == first.prompt_tokens - 1
        assert again.differs(first) < ROUNDING
        assert changed.cached_tokens is not None
        first_row = engine.generator._prepare.place(case.request, [lease]).images[0][0][0]
        assert changed.cached_tokens <= first_row
        assert changed.differs(first) > 10 * ROUNDING


async def test_a_salt_parts_the_prefix_cache(engine: Engine) -> None:
    case = case_of(engine, 3)
    mine, theirs = (replace(case.request, cache_salt=salt) for salt in ("mine", "theirs"))
    with engine.lease(engine.encode(case.images[0])) as lease:
        assert (await engine.answer(mine, [lease])).cached_tokens == 0
        assert ((await engine.answer(mine, [lease])).cached_tokens or 0) > 0
        assert (await engine.answer(theirs, [lease])).cached_tokens == 0


async def test_one_image_twice(engine: Engine) -> None:
    case = case_of(engine, 5, 5)
    expected = await engine.from_pixels(case)
    with (
        engine.lease(engine.encode(case.images[0], 2)) as lease,
        engine.lease(engine.encode(image_of(engine, 6), 2)) as other,
    ):
        assert (await engine.answer(case.request, [lease, lease])).differs(expected) < ROUNDING
        assert (await engine.answer(case.request, [lease, other])).differs(expected) > 10 * ROUNDING


async def test_sglang_reads_the_arena_and_writes_nothing_there(engine: Engine) -> None:
    case = case_of(engine, 7, 8)
    leases = [engine.lease(engine.encode(image, 2)) for image in case.images]
    before = [lease.tensor.clone() for lease in leases]
    await engine.answers(case.request, leases, replace(GREEDY, choices=2, temperature=1.0))
    for lease, bytes_before in zip(leases, before, strict=True):
        assert torch.equal(lease.tensor, bytes_before)
        lease.release()


async def test_two_choices_are_drawn_each_for_itself(engine: Engine) -> None:
    case = case_of(engine, 6)
    with engine.lease(engine.encode(case.images[0])) as lease:
        drawn = replace(GREEDY, temperature=2.0, choices=2, max_tokens=24)
        await engine.forget()
        first, second = await engine.answers(case.request, [lease], drawn)
        assert (len(first.tokens), len(second.tokens)) == (24, 24)
        assert first.tokens != second.tokens
        assert first.cached_tokens == 0
        assert second.cached_tokens == second.prompt_tokens - 1, "the prompt was computed once"


async def test_text_alone(engine: Engine) -> None:
    case = chat_case(engine.model_dir, [], ["Hello there"])
    expected = await engine.from_pixels(case)
    assert (await engine.answer(case.request, [])).differs(expected) < ROUNDING
