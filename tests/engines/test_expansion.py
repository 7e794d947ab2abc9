"""Placeholders become exactly the tokens that the model's own processor makes of them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.conftest import Halves
from tests.engines.contract import (
    Case,
    assert_logits_are_the_models_own,
    chat_case,
    picture,
    pictures,
    reference_inputs,
    reference_model,
    reference_processor,
)
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.errors import EmbeddingMismatchError, PlaceholderMismatchError

NEIGHBOURS = ("", "\n", "\n\n\n", " ", "word", " \n", "\n ")
"""Texts whose edges could merge with the edges of an expansion."""


@functools.cache
def expander_of(model_dir: Path) -> PromptExpander:
    return PromptExpander(reference_processor(model_dir), reference_model(model_dir).config)


def placeholders_of(halves: Halves, case: Case) -> list[str]:
    """Return the texts that the encode side gives with the images."""
    items = case.items(halves.generator.variant(len(case.images)))
    return [str(halves.encode(item).metadata.placeholder) for item in items]


def expanded(case: Case, placeholders: list[str]) -> list[int]:
    """Return the prompt as the PD side expands it."""
    request = case.request
    return expander_of(case.model_dir).expand(request.token_ids, request.prompt_text, placeholders)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("add_special_tokens", [False, True])
@pytest.mark.parametrize("with_text", [False, True])
def test_expansion_is_the_processors(
    halves: Halves, count: int, add_special_tokens: bool, with_text: bool
) -> None:
    case = chat_case(
        halves.model_dir, pictures(count), add_special_tokens=add_special_tokens, with_text=with_text
    )
    assert expanded(case, placeholders_of(halves, case)) == reference_inputs(case)["input_ids"][0].tolist()


@pytest.mark.parametrize("with_text", [False, True])
def test_expansion_is_the_processors_whatever_stands_beside_it(halves: Halves, with_text: bool) -> None:
    image = picture(3, 30, 30)
    placeholders = placeholders_of(halves, chat_case(halves.model_dir, [image]))
    for before, after in itertools.product(NEIGHBOURS, NEIGHBOURS):
        case = chat_case(halves.model_dir, [image], [before, after], with_text=with_text)
        expected = reference_inputs(case)["input_ids"][0].tolist()
        assert expanded(case, placeholders) == expected, (before, after)


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("qwen2_vl", {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4}}),
        ("internvl", {"max_patches": 2}),
        ("internvl", {"crop_to_patches": False}),
        ("smolvlm", {"do_image_splitting": False}),
        ("idefics3", {"size": {"longest_edge": 112}}),
        ("gemma3", {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}),
    ],
)
def test_processor_kwargs_reach_the_expansion_and_the_features(
    halves_of: Callable[[str], Halves], architecture: str, kwargs: dict[str, Any]
) -> None:
    halves = halves_of(architecture)
    case = chat_case(halves.model_dir, pictures(1), processor_kwargs=kwargs)
    plain = replace(case, processor_kwargs={})
    tokens = expanded(case, placeholders_of(halves, case))
    assert tokens == reference_inputs(case)["input_ids"][0].tolist()
    assert tokens != expanded(plain, placeholders_of(halves, plain))
    assert_logits_are_the_models_own(halves.generator, case, halves.carry(case.items("")))


class CountingTokenizer:
    """The tokenizer, which notes how many characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("with_text", [False, True])
def test_no_more_is_tokenised_for_more_rows(small: Halves, with_text: bool) -> None:
    case = chat_case(small.model_dir, pictures(1), with_text=with_text)
    processor = copy.copy(reference_processor(small.model_dir))
    processor.tokenizer = counting = CountingTokenizer(processor.tokenizer)
    expander = PromptExpander(processor, reference_model(small.model_dir).config)
    token = processor.image_token
    given, found = [], []
    for rows in (1, 3000):
        counting.characters = 0
        request = case.request
        found.append(expander.expand(request.token_ids, request.prompt_text, [token * rows]))
        given.append(counting.characters)
    assert len(found[1]) - len(found[0]) == 2999
    assert given[0] == given[1]


def test_gemma_joins_newlines_across_the_edge(halves_of: Callable[[str], Halves]) -> None:
    """The case that expanding token ids one by one gets wrong must be one that these tests contain."""
    halves = halves_of("gemma3")
    case = chat_case(halves.model_dir, pictures(1), ["\n", "\n"])
    tokenizer = reference_processor(halves.model_dir).tokenizer
    (placeholder,) = placeholders_of(halves, case)
    by_ids: list[int] = []
    for token in case.request.token_ids:
        inserted = tokenizer(placeholder, add_special_tokens=False)["input_ids"]
        by_ids += inserted if token == tokenizer.boi_token_id else [token]
    assert by_ids != reference_inputs(case)["input_ids"][0].tolist()


@pytest.mark.parametrize("architecture", ["llava", "gemma3"])
def test_tokens_that_no_tokenizer_makes_are_kept(
    halves_of: Callable[[str], Halves], architecture: str
) -> None:
    """A client may send ids: what it split stays split, and around the image it is as with text."""
    halves = halves_of(architecture)
    case = chat_case(halves.model_dir, pictures(1), ["Hello\n", "\nyes"])
    tokenizer = reference_processor(halves.model_dir).tokenizer
    canonical = reference_inputs(case)["input_ids"][0].tolist()
    split = tokenizer.convert_tokens_to_ids(["y", "e", "s"])
    joined = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert split != joined
    request = case.request
    tail = tokenizer.convert_tokens_to_ids(["<eos>" if architecture == "gemma3" else "</s>"]) + split
    tokens = expander_of(case.model_dir).expand(
        (*request.token_ids, *tail), None, placeholders_of(halves, case)
    )
    assert tokens == canonical + tail


def test_a_typed_placeholder_is_refused(halves: Halves) -> None:
    placeholder = reference_processor(halves.model_dir).image_token
    for count in (0, 1, 2):
        texts = [f"I type {placeholder} myself", *["\nthen "] * count]
        case = chat_case(halves.model_dir, pictures(count), texts)
        leases = halves.carry(case.items(halves.generator.variant(count)))
        with pytest.raises(PlaceholderMismatchError):
            halves.generator.prefill_logits(case.request, leases)


def test_missing_and_surplus_images_are_refused(halves: Halves) -> None:
    case = chat_case(halves.model_dir, pictures(2))
    leases = halves.carry(case.items(halves.generator.variant(2)))
    for wrong in ([], leases[:1], [*leases, leases[0]]):
        with pytest.raises(PlaceholderMismatchError, match=f"2 image placeholders for {len(wrong)} images"):
            halves.generator.prefill_logits(case.request, wrong)


@pytest.mark.parametrize(
    ("architecture", "token"),
    [
        ("qwen2_vl", "<|video_pad|>"),
        ("llava_onevision", "<video>"),
        ("internvl", "<video>"),
        ("gemma3", "<image_soft_token>"),
    ],
)
def test_other_typed_media_tokens_are_refused(
    halves_of: Callable[[str], Halves], architecture: str, token: str
) -> None:
    halves = halves_of(architecture)
    for count in (0, 1):
        case = chat_case(halves.model_dir, pictures(count), [f"I type {token}", *["\nthen"] * count])
        leases = halves.carry(case.items(halves.generator.variant(count)))
        with pytest.raises(PlaceholderMismatchError, match=token):
            halves.generator.prefill_logits(case.request, leases)


def test_touching_images_are_refused_where_the_decoder_cannot_tell_them_apart(
    halves_of: Callable[[str], Halves],
) -> None:
    halves = halves_of("qwen2_5_vl")
    case = Case(halves.model_dir, "a <|image_pad|><|image_pad|> b", pictures(2))
    with pytest.raises(PlaceholderMismatchError, match="touch"):
        halves.generator.prefill_logits(case.request, halves.carry(case.items("")))


def test_an_embedding_of_another_shape_is_refused(halves: Halves) -> None:
    case = chat_case(halves.model_dir, pictures(1))
    encoded = halves.encode(case.items(halves.generator.variant(1))[0])
    tensor = encoded.tensor
    wrong = {
        "rows": tensor[:-1].clone(),
        "width": tensor[:, :-1].clone(),
        "dtype": tensor.to(torch.bfloat16),
    }
    for name, other in wrong.items():
        lease = halves.lease(EncodedItem(other, encoded.metadata))
        with pytest.raises(EmbeddingMismatchError) as caught:
            halves.generator.prefill_logits(case.request, [lease])
        assert caught.value.item_index == 0, name


def test_an_embedding_without_placeholder_text_is_refused(small: Halves) -> None:
    case = chat_case(small.model_dir, pictures(1))
    lease = small.lease(EncodedItem(small.encode(case.items("")[0]).tensor, EmbeddingMetadata()))
    with pytest.raises(EmbeddingMismatchError, match="placeholder"):
        small.generator.prefill_logits(case.request, [lease])
