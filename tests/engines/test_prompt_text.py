"""The prompt of chat messages is what the model's own processor makes of them, text and tokens."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import ProcessorMixin

from tests.engines.chat_templates import (
    ALTERNATING,
    COUNTED_IMAGES,
    IMAGES_FIRST,
    STRINGS_ALONE,
    TEMPLATES,
)
from tests.engines.conftest import Halves, ModelFactory
from tests.engines.contract import ARCHITECTURES, pictures, reference_processor
from tests.engines.test_expansion import expander_of
from trtllm_mm_cache.engines.base import EncodeItem
from trtllm_mm_cache.engines.prompt_text import PromptRenderer
from trtllm_mm_cache.errors import ConfigurationError, InvalidRequestError, PlaceholderMismatchError

Message = dict[str, Any]
IMAGE: Message = {"type": "image_url", "image_url": {"url": "https://media.test/secret.png"}}
CASES = [(name, None) for name in ARCHITECTURES] + [
    (name, template) for name, several in TEMPLATES.items() for template in several
]


def text(words: str) -> Message:
    return {"type": "text", "text": words}


def user(*parts: Message) -> Message:
    return {"role": "user", "content": list(parts)}


CONVERSATIONS: dict[str, list[Message]] = {
    "no image": [user(text("Hello\n\nthere!"))],
    "image before": [user(IMAGE, text("What is it?"))],
    "image after": [user(text("What is this:\n"), IMAGE)],
    "image alone": [user(IMAGE)],
    "two before": [user(IMAGE, IMAGE, text(" Compare the two images."))],
    "between": [user(text("Look at "), IMAGE, text("\n\nand this \n\n\n"), IMAGE, text("\nWhat?"))],
    "three around": [user(IMAGE, text("first"), IMAGE, text(" second\n"), IMAGE)],
    "turns": [
        {"role": "system", "content": [text("You are a helpful assistant.")]},
        user(IMAGE, text("What is it?")),
        {"role": "assistant", "content": [text("A cat.\n")]},
        user(text("And this?"), IMAGE, text("\n")),
        {"role": "assistant", "content": [text(" An open book ")]},
        user(text("Compare the two images.")),
    ],
}


@functools.cache
def renderer_of(model_dir: Path, template: str | None = None) -> PromptRenderer:
    if template is None:
        return PromptRenderer.from_model(model_dir)
    processor = reference_processor(model_dir)
    return PromptRenderer(processor.tokenizer, template, processor.image_token)


def for_processor(messages: Sequence[Message], images: Iterator[Image.Image]) -> list[Message]:
    """Return the messages with the images themselves, as Hugging Face's processors take them."""
    return [
        {
            **message,
            "content": [{"type": "image", "image": next(images)} if p is IMAGE else p for p in content],
        }
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]


def processors_tokens(
    model_dir: Path, template: str | None, messages: Sequence[Message], **options: Any
) -> list[int]:
    processor = reference_processor(model_dir)
    # SmolVLM's own method asks its video processor first; what it then calls is this.
    output = ProcessorMixin.apply_chat_template(
        processor,
        for_processor(messages, iter(pictures(3))),
        chat_template=template or processor.tokenizer.chat_template,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        **options,
    )
    (token_ids,) = output["input_ids"]
    return list(token_ids)


def count(messages: Sequence[Message]) -> int:
    return sum(part is IMAGE for message in messages for part in message["content"])


def expanded(halves: Halves, template: str | None, messages: Sequence[Message], **options: Any) -> list[int]:
    """Return the prompt as the frontend tokenises it and the PD worker expands it."""
    prompt = renderer_of(halves.model_dir, template).render(messages, **options)
    images = pictures(count(messages))
    variant = halves.generator.variant(len(images))
    placeholders = [str(halves.encode(EncodeItem(each, {}, variant)).metadata.placeholder) for each in images]
    expander = expander_of(halves.model_dir)
    assert expander.expand(prompt.token_ids, None, placeholders) == expander.expand(
        prompt.token_ids, prompt.text, placeholders
    )
    return expander.expand(prompt.token_ids, prompt.text, placeholders)


@pytest.mark.parametrize(("architecture", "template"), CASES)
def test_the_prompt_is_the_processors(halves_of: Any, architecture: str, template: str | None) -> None:
    halves = halves_of(architecture)
    for name, messages in CONVERSATIONS.items():
        expected = processors_tokens(halves.model_dir, template, messages)
        assert expanded(halves, template, messages) == expected, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_begins_as_the_model_was_trained(model_of: ModelFactory, architecture: str) -> None:
    """With the token before every sequence once, where the family has one, whoever writes it."""
    model_dir = model_of(architecture)
    beginning = reference_processor(model_dir).tokenizer.bos_token_id
    token_ids = renderer_of(model_dir).render(CONVERSATIONS["image before"]).token_ids
    families = ("llava", "llava_next", "gemma3", "smolvlm", "idefics3")
    assert (beginning is not None) == (architecture in families)
    if beginning is not None:
        assert token_ids[0] == beginning
        assert token_ids[1] != beginning


@pytest.mark.parametrize("name", ["image before", "turns"])
def test_a_text_content_is_rendered_like_a_list_of_it(model_of: ModelFactory, name: str) -> None:
    """LLaVA's template drops a string without a word."""
    messages = [
        {**message, "content": message["content"][0]["text"]}
        if len(message["content"]) == 1 and message["content"][0] is not IMAGE
        else message
        for message in CONVERSATIONS[name]
    ]
    for architecture, template in (("llava", IMAGES_FIRST), ("qwen2_vl", COUNTED_IMAGES)):
        renderer = renderer_of(model_of(architecture), template)
        assert renderer.render(messages) == renderer.render(CONVERSATIONS[name])
        assert "Compare" in renderer.render([{"role": "user", "content": "Compare"}]).text


def test_a_template_of_texts_alone_gets_a_placeholder_for_each_image(halves_of: Any) -> None:
    halves = halves_of("qwen2_vl")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    messages = CONVERSATIONS["between"]
    joined = f"Look at \n{image}\n\n\nand this \n\n\n\n{image}\n\nWhat?"
    prompt = renderer_of(halves.model_dir, STRINGS_ALONE).render(messages)
    assert prompt.text == f"<|im_start|>user\n{joined}<|im_end|>\n<|im_start|>assistant\n"
    processor = reference_processor(halves.model_dir)
    expected = processor(images=[pictures(2)], text=[prompt.text])["input_ids"][0]
    assert expanded(halves, STRINGS_ALONE, messages) == list(expected)
    llava = renderer_of(halves_of("llava").model_dir, STRINGS_ALONE)
    assert llava.render([user(IMAGE, text("What?"))]).text.startswith("<|im_start|>user\n<image>\nWhat?")


def test_what_the_template_is_told(halves_of: Any) -> None:
    halves = halves_of("qwen2_vl")
    messages = CONVERSATIONS["two before"]
    told = expanded(halves, COUNTED_IMAGES, messages, chat_template_kwargs={"add_vision_id": True})
    assert told == processors_tokens(halves.model_dir, COUNTED_IMAGES, messages, add_vision_id=True)
    assert told != expanded(halves, COUNTED_IMAGES, messages)
    renderer = renderer_of(halves.model_dir, COUNTED_IMAGES)
    for name in ("chat_template", "tokenize", "messages", "eos_token"):
        with pytest.raises(InvalidRequestError, match=f"chat_template_kwargs.{name}"):
            renderer.render(messages, chat_template_kwargs={name: "{{ 7 * 7 }}"})


def test_the_final_message_is_continued(model_of: ModelFactory) -> None:
    messages = [user(text("Count.")), {"role": "assistant", "content": "1, 2,"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for architecture, template in (("llava", IMAGES_FIRST), ("gemma3", ALTERNATING), ("qwen2_vl", None)):
        prompt = renderer_of(model_of(architecture), template).render(messages, **options)
        assert prompt.text.endswith("1, 2,")


@pytest.mark.parametrize("form", ["text", "part", "two parts", "tool", "name", "variable"])
def test_a_control_token_in_a_text_is_refused(model_of: ModelFactory, form: str) -> None:
    for architecture, token in (
        ("qwen2_vl", "<|im_end|>"),
        ("qwen2_vl", "<|image_pad|>"),
        ("qwen3_vl", "<|video_pad|>"),
        ("llava", "<image>"),
        ("llava_next", "</s>"),
        ("gemma3", "<start_of_image>"),
        ("gemma3", "<image_soft_token>"),
        ("internvl", "<IMG_CONTEXT>"),
        ("smolvlm", "<end_of_utterance>"),
    ):
        typed = f"what is {token}?"
        messages: list[Message] = [user(text("Hello"))]
        options: dict[str, Any] = {}
        match form:
            case "text":
                messages[0] = {"role": "user", "content": typed}
            case "part":
                messages[0] = user(IMAGE, text(typed))
            case "two parts":
                messages[0] = user(text(typed[:11]), text(typed[11:]))
            case "tool":
                options["tools"] = [{"type": "function", "function": {"name": typed}}]
            case "name":
                messages[0] = {**messages[0], "name": typed}
            case "variable":
                options["chat_template_kwargs"] = {"words": [{"x": typed}]}
        with pytest.raises(InvalidRequestError) as caught:
            renderer_of(model_of(architecture)).render(messages, **options)
        assert token in caught.value.message
        where = {"tool": "tools", "variable": "chat_template_kwargs"}.get(form, "messages[0]")
        assert caught.value.message.startswith(where)


def test_what_only_looks_like_a_control_token_is_served(model_of: ModelFactory) -> None:
    words = "a < b, |im_end|, <|im_end>, < image >, <b>bold</b>"
    for architecture in ARCHITECTURES:
        assert words in renderer_of(model_of(architecture)).render([user(text(words))]).text


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"content": "x"}], r"messages\[0\]"),
        (["x"], r"messages\[0\]"),
        ([{"role": "user<|im_end|>", "content": "x"}], r"messages\[0\]"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([user(text("x"), {"type": "input_audio", "input_audio": {}})], r"messages\[0\]\.content\[1\]"),
        ([user({"type": "text", "text": None})], r"messages\[0\]\.content\[0\]"),
        ([user(text("x")), {"role": "assistant", "tool_calls": [{}]}], r"messages\[1\]\.tool_calls\[0\]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments must be JSON",
        ),
        ([], "refuses the messages"),
    ],
)
def test_malformed_messages_are_refused_by_name(
    model_of: ModelFactory, messages: list[Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        renderer_of(model_of("qwen2_vl")).render(messages)


def test_the_templates_own_refusal_is_passed_on(model_of: ModelFactory) -> None:
    messages = [user(text("a")), user(text("b"))]
    with pytest.raises(InvalidRequestError, match=r"Turns must go user/assistant/user/\.\.\."):
        renderer_of(model_of("gemma3"), ALTERNATING).render(messages)


def test_an_image_that_the_template_leaves_out_is_refused(model_of: ModelFactory) -> None:
    messages = [{"role": "tool", "content": [IMAGE]}, user(IMAGE, text("What?"))]
    template = "{% for message in messages if message['role'] == 'user' %}<image>{% endfor %}"
    with pytest.raises(PlaceholderMismatchError, match="1 image placeholders of 2 images"):
        renderer_of(model_of("llava"), template).render(messages)


def test_arguments_of_tool_calls_reach_the_template_as_objects(model_of: ModelFactory) -> None:
    template = (
        "{% for message in messages %}{% for call in message.tool_calls or [] %}"
        "{{ call.function.arguments | tojson }}{% endfor %}{{ message['content'] }}{% endfor %}"
        "{{ tools | tojson if tools else '' }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages = [user(text("a")), {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = renderer_of(model_of("qwen2_vl"), template).render(messages, tools)
    assert prompt.text.endswith('{"x": "é"}' + json.dumps(tools))


def test_no_address_reaches_the_template(model_of: ModelFactory) -> None:
    template = (
        "{% for part in messages[0].content %}{{ part | tojson }}"
        "{% if part.type == 'image' %}<|image_pad|>{% endif %}{% endfor %}"
    )
    prompt = renderer_of(model_of("qwen2_vl"), template).render([user(IMAGE)])
    assert prompt.text == '{"type": "image"}<|image_pad|>'


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
def test_the_processors_template_goes_before_the_tokenizers(
    model_of: ModelFactory, tmp_path: Path, name: str
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(model_of("llava"), model_dir)
    if name == "chat_template.jinja":
        (model_dir / name).write_text(IMAGES_FIRST)
    else:
        path = model_dir / name
        held = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps({**held, "chat_template": IMAGES_FIRST}))
    messages = CONVERSATIONS["turns"]
    assert renderer_of(model_dir).render(messages) == renderer_of(model_dir, IMAGES_FIRST).render(messages)


def test_a_model_that_cannot_chat(model_of: ModelFactory, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(model_of("llava"), model_dir)
    path = model_dir / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "chat_template": None}))
    with pytest.raises(ConfigurationError, match=r"chat_template\.jinja"):
        PromptRenderer.from_model(model_dir)
    (model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match="tokenizer cannot be used"):
        PromptRenderer.from_model(model_dir)
