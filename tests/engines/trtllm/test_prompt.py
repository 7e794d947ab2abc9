"""The text that the engine gets, and the tokens it will make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import ModelFactory
from tests.engines.contract import chat_case, pictures, reference_processor
from tests.engines.test_prompt_text import CASES, CONVERSATIONS, count, processors_tokens, renderer_of
from trtllm_mm_cache.engines.base import EncodeItem, GenerationRequest, SamplingParams
from trtllm_mm_cache.engines.trtllm.prompt import PromptReader
from trtllm_mm_cache.errors import InvalidRequestError, PlaceholderMismatchError


def reader_of(model_dir: Path) -> PromptReader:
    tokenizer = reference_processor(model_dir).tokenizer
    names = ("<image>",) if model_dir.name == "llava_next" else ("<|image_pad|>", "<|video_pad|>")
    return PromptReader(tokenizer, tuple(tokenizer.convert_tokens_to_ids(name) for name in names))


@pytest.fixture(params=["qwen3_vl", "llava_next"])
def model_dir(request: pytest.FixtureRequest, model_of: ModelFactory) -> Path:
    return model_of(request.param)


@pytest.mark.parametrize("with_text", [True, False], ids=["text", "tokens alone"])
def test_the_text_gives_the_frontends_tokens(model_dir: Path, with_text: bool) -> None:
    case = chat_case(model_dir, pictures(2), with_text=with_text)
    prompt = reader_of(model_dir).read(case.request, 2)
    tokenizer = reference_processor(model_dir).tokenizer
    assert list(tokenizer(prompt.text).input_ids) == prompt.token_ids
    beginning = [tokenizer.bos_token_id] if model_dir.name == "llava_next" else []
    assert prompt.token_ids == [*beginning, *case.request.token_ids]


def test_a_template_with_its_own_beginning_gets_no_second_one(model_of: ModelFactory) -> None:
    model_dir = model_of("llava_next")
    case = chat_case(model_dir, pictures(1), add_special_tokens=True)
    for text in (f"<s>{case.prompt}", None):
        request = replace(case.request, prompt_text=text)
        prompt = reader_of(model_dir).read(request, 1)
        assert prompt.token_ids == list(request.token_ids)
        assert prompt.token_ids.count(reference_processor(model_dir).tokenizer.bos_token_id) == 1


def test_a_text_that_gives_other_tokens_is_not_sent(model_dir: Path) -> None:
    case = chat_case(model_dir, pictures(1))
    prompt = reader_of(model_dir).read(replace(case.request, prompt_text="something else <image>"), 1)
    assert "something else" not in prompt.text
    assert prompt.token_ids[-len(case.request.token_ids) :] == list(case.request.token_ids)


@pytest.mark.parametrize(("architecture", "template"), CASES)
def test_the_renderers_prompt_is_sent_as_it_is(
    model_of: ModelFactory, architecture: str, template: str | None
) -> None:
    """For every kind of tokenizer: the engine gets the rendered text, and makes the rendered tokens of it."""
    model_dir = model_of(architecture)
    tokenizer, renderer = reference_processor(model_dir).tokenizer, renderer_of(model_dir, template)
    image_token_id = tokenizer.convert_tokens_to_ids(reference_processor(model_dir).image_token)
    reader = PromptReader(tokenizer, (image_token_id,))
    for name, messages in CONVERSATIONS.items():
        rendered = renderer.render(messages)
        request = GenerationRequest("r", tuple(rendered.token_ids), rendered.text, SamplingParams())
        prompt = reader.read(request, count(messages))
        assert prompt.token_ids == rendered.token_ids == list(tokenizer(prompt.text).input_ids), name
        beginning = tokenizer.bos_token or ""
        assert prompt.text in (rendered.text, rendered.text.removeprefix(beginning)), name


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_what_the_engine_expands_is_the_processors_prompt(halves_of: Any, architecture: str) -> None:
    """The engine repeats each placeholder for its embedding's rows."""
    halves = halves_of(architecture)
    for name, messages in CONVERSATIONS.items():
        rendered = renderer_of(halves.model_dir).render(messages)
        request = GenerationRequest("r", tuple(rendered.token_ids), rendered.text, SamplingParams())
        prompt = reader_of(halves.model_dir).read(request, count(messages))
        rows = iter([len(halves.encode(EncodeItem(image)).tensor) for image in pictures(count(messages))])
        placeholder = reference_processor(halves.model_dir).image_token
        placeholder_id = reference_processor(halves.model_dir).tokenizer.convert_tokens_to_ids(placeholder)
        expanded: list[int] = []
        for token in prompt.token_ids:
            expanded += [token] * (next(rows) if token == placeholder_id else 1)
        assert expanded == processors_tokens(halves.model_dir, None, messages), name


def test_tokens_that_no_text_gives_are_refused(model_of: ModelFactory) -> None:
    model_dir = model_of("qwen3_vl")
    tokenizer = reference_processor(model_dir).tokenizer
    whole = tokenizer.encode("the")
    apart = [tokenizer.encode(letter)[0] for letter in "the"]
    assert whole != apart
    case = chat_case(model_dir, pictures(1))
    request = replace(case.request, token_ids=(*case.request.token_ids, *apart), prompt_text=None)
    with pytest.raises(InvalidRequestError, match="no text gives these tokens"):
        reader_of(model_dir).read(request, 1)


def test_placeholders_typed_by_a_user_are_refused(model_dir: Path) -> None:
    typed = "<image>" if model_dir.name == "llava_next" else "<|image_pad|>"
    case = chat_case(model_dir, pictures(1), ["", f"what does {typed} mean?"])
    with pytest.raises(PlaceholderMismatchError, match="2 image placeholders for 1 images"):
        reader_of(model_dir).read(case.request, 1)


def test_a_videos_placeholder_counts_as_one_too_many(model_of: ModelFactory) -> None:
    case = chat_case(model_of("qwen3_vl"), pictures(1), ["", "<|video_pad|>"])
    with pytest.raises(PlaceholderMismatchError, match="images and videos"):
        reader_of(model_of("qwen3_vl")).read(case.request, 1)
