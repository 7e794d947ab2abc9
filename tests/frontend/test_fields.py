"""Every field that a client may send is served, or refused by its own name as the client wrote it.

The names come from the types of the installed `openai` package: one that it adds fails here until it is
decided.
"""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import chat_completion_assistant_message_param as assistant_params
from openai.types.chat import chat_completion_content_part_image_param as image_params
from openai.types.chat import chat_completion_content_part_param as part_params
from openai.types.chat import chat_completion_content_part_text_param as text_part_params
from openai.types.chat import chat_completion_message_param as message_params
from openai.types.chat import chat_completion_stream_options_param as stream_params
from openai.types.chat import chat_completion_user_message_param as user_params
from openai.types.chat import completion_create_params as chat_params

from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.frontend.request import ChatRequest, CompletionRequest, GenerationOptions, read_request
from trtllm_mm_cache.frontend.responses import error_object

Object = dict[str, Any]

IMAGE = {"type": "image_url", "image_url": {"url": "https://media.test/a.png"}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}

# Each field: values that are served, or ask for nothing; and values that are refused by the field's name.
BOTH: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["m"], [5, ["m"], {}]),
    "frequency_penalty": ([0, -2, 1.5], [2.1, "1", True]),
    "presence_penalty": ([0, 2], [-2.1, []]),
    "logit_bias": (
        [{}, {"17": -100, "3": 5}],
        [{"a": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, [1], {str(2**32): 1}],
    ),
    "max_tokens": ([1, 4096], [0, -1, 1.5, "5", True, 2**31]),
    "n": ([1, 2, 128], [0, 129, 1.5, True, "1"]),
    "seed": ([0, -(2**63), 2**63 - 1], [1.5, "x", 2**63, True]),
    "stop": (["x", ["x", "y"], []], ["", [""], 5, {"a": 1}, ["x" * 1025], ["x"] * 65, [5]]),
    "temperature": ([0, 0.7, 2], [-1, 101, "hot", True]),
    "top_p": ([1, 0.1], [0, 1.1, "x"]),
    "user": (["someone", ""], []),
}
CHAT: dict[str, tuple[list[Any], list[Any]]] = BOTH | {
    "messages": (
        [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": [IMAGE]}]],
        [[], 5, "Hello", {}, [5], [{}], [{"role": "user", "content": "x"}] * 4097],
    ),
    "audio": ([], [{"voice": "alloy", "format": "wav"}]),
    "function_call": (["none"], ["auto", {"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logprobs": ([False, True], [1, "yes"]),
    "max_completion_tokens": ([1], [0, "5"]),
    "metadata": ([{"a": "b"}], []),
    "modalities": ([["text"]], [["text", "audio"], ["audio"], []]),
    "moderation": ([], [{"model": "omni-moderation-latest"}]),
    "parallel_tool_calls": ([], [True, False]),
    "prediction": ([], [{"type": "content", "content": "x"}]),
    "prompt_cache_key": (["k"], []),
    "prompt_cache_options": ([], [{"mode": "explicit"}]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "reasoning_effort": (["none"], ["low", "high"]),
    "response_format": (
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        ],
        [5, "json"],
    ),
    "safety_identifier": (["x"], []),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "store": ([False], [True, 0]),
    "tool_choice": (["none"], ["auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([[]], [[FUNCTION]]),
    "verbosity": (["medium"], ["low", "high"]),
    "web_search_options": ([], [{}]),
}
TEXT: dict[str, tuple[list[Any], list[Any]]] = BOTH | {
    "prompt": (
        ["Once", "", [1, 2, 3], ["Once"], [[1, 2]]],
        [[], [[]], ["a", "b"], [[1], [2]], 5, {}, [1, -1], [True], [2**32], ["a", 1], [None], [[["a"]]]],
    ),
    "best_of": ([1], [2]),
    "echo": ([False], [True]),
    "logprobs": ([], [0, 1]),
    "suffix": ([""], ["end"]),
}
STREAM_OPTIONS: tuple[list[Any], list[Any]] = (
    [{}, {"include_usage": True}, {"include_usage": None, "include_obfuscation": False}],
    [
        5,
        {"include_usage": "yes"},
        {"include_obfuscation": True},
        {"continuous_usage_stats": True},
        {"more": 1},
    ],
)

# vLLM's, SGLang's and Dynamo's own fields; the refused ones a client of those may bring along.
EXTRA: dict[str, tuple[list[Any], list[Any]]] = {
    "min_tokens": ([0, 5], [-1, "x"]),
    "top_k": ([-1, 0, 50], [-2, 1.5]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "repetition_penalty": ([1, 0.01, 100], [0, -1, 0.009]),
    "stop_token_ids": ([[], [1, 2]], [[-1], ["a"], 5]),
    "ignore_eos": ([True, False], [1, "x"]),
    "skip_special_tokens": ([True, False], ["x"]),
    "cache_salt": (["s", ""], [5, "x" * 1025]),
    "nvext": ([{}, {"cache_salt": "s"}], [5, {"annotations": []}, {"cache_salt": 5}]),
    "use_beam_search": ([False], [True]),
    "length_penalty": ([1, 1.0], [2]),
    "prompt_logprobs": ([0, 20], [-1, 21, 1.5, True, "1"]),
    "include_stop_str_in_output": ([False], [True]),
    "spaces_between_special_tokens": ([True], [False]),
    "truncate_prompt_tokens": ([], [5]),
    **{
        name: ([], [value])
        for name, value in {
            "structured_outputs": {"regex": "a"},
            "allowed_token_ids": [1],
            "bad_words": ["x"],
            "add_special_tokens": False,
            "priority": 1,
            "request_id": "x",
            "logits_processors": ["x"],
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "kv_transfer_params": {},
            "vllm_xargs": {},
            "separate_reasoning": True,
            "regex": "a",
            "ebnf": "a",
            "lora_path": "x",
            "no_such_field": 0,
        }.items()
    },
}
EXTRA_CHAT: dict[str, tuple[list[Any], list[Any]]] = EXTRA | {
    "guided_json": ([{}, {"type": "object"}, '{"type": "object"}'], [5, []]),
    "guided_regex": (["a+"], [5]),
    "guided_choice": ([["a", "b"]], ["a", [5]]),
    "guided_grammar": (["root ::= 'a'"], [5]),
    "chat_template_kwargs": ([{}, {"thinking": False}], [5, []]),
    "add_generation_prompt": ([True, False], ["x", 1]),
    "continue_final_message": ([False], ["x"]),
    "mm_processor_kwargs": ([{}, {"max_pixels": 1}], [5, [1]]),
    "chat_template": ([], ["{{ messages }}"]),
    "documents": ([[]], [[{"text": "x"}]]),
    "best_of": ([1], [2]),
    "echo": ([False], [True]),
}
# These need another field with them.
TOGETHER: dict[str, Object] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}

CHAT_BASE: Object = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT_BASE: Object = {"model": "m", "prompt": "Once"}
APIS: dict[str, tuple[type[GenerationOptions], Object, dict[str, tuple[list[Any], list[Any]]]]] = {
    "chat": (
        ChatRequest,
        CHAT_BASE,
        CHAT
        | EXTRA_CHAT
        | {
            "stream_options": STREAM_OPTIONS,
            "top_logprobs": ([0, 20], [-1, 21, 1.5]),
            "stream": ([True, False], [1]),
        },
    ),
    "text": (
        CompletionRequest,
        TEXT_BASE,
        TEXT | EXTRA | {"stream_options": STREAM_OPTIONS, "stream": ([True, False], ["x"])},
    ),
}
SERVED = [
    (api, name, value) for api, (_, _, fields) in APIS.items() for name in fields for value in fields[name][0]
]
REFUSED = [
    (api, name, value) for api, (_, _, fields) in APIS.items() for name in fields for value in fields[name][1]
]


def read(api: str, fields: Object) -> GenerationOptions:
    kind, base, _ = APIS[api]
    return read_request(kind, {**base, **fields})


def refusal(api: str, fields: Object) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read(api, fields)
    text = str(caught.value)
    assert len(text) < 500
    assert "pydantic" not in text
    assert "Value error" not in text
    return text


def names(params: Any) -> set[str]:
    return set(typing.get_type_hints(params))


def test_every_field_of_openais_requests_is_decided() -> None:
    streamed = names(chat_params.CompletionCreateParamsStreaming)
    assert streamed == CHAT.keys() | {"stream", "stream_options", "top_logprobs"}
    assert names(text_params.CompletionCreateParamsStreaming) == TEXT.keys() | {"stream", "stream_options"}
    assert names(stream_params.ChatCompletionStreamOptionsParam) == {"include_usage", "include_obfuscation"}


@pytest.mark.parametrize(("api", "name", "value"), SERVED, ids=lambda each: str(each)[:30])
def test_what_is_served_is_taken(api: str, name: str, value: Any) -> None:
    request = read(api, {**TOGETHER.get(name, {}), name: value})
    if name in type(request).model_fields and name not in (
        "messages",
        "prompt",
        "stop",
        "nvext",
        "stream_options",
    ):
        assert getattr(request, name) == value


@pytest.mark.parametrize(("api", "name", "value"), REFUSED, ids=lambda each: str(each)[:30])
def test_what_is_not_served_is_refused_by_its_name(api: str, name: str, value: Any) -> None:
    text = refusal(api, {**TOGETHER.get(name, {}), name: value})
    place = text.partition(":")[0]
    assert place == name or place.startswith((f"{name}.", f"{name}["))
    error = error_object(InvalidRequestError(text))["error"]
    assert error["param"] == place


@pytest.mark.parametrize("api", APIS)
def test_null_is_as_good_as_no_field(api: str) -> None:
    kind, base, fields = APIS[api]
    plain = read_request(kind, dict(base))
    for name in fields.keys() - base.keys():
        assert read(api, {name: None}) == plain, name
    assert read(api, dict.fromkeys(fields.keys() - base.keys())) == plain


@pytest.mark.parametrize(
    ("api", "name"), [(api, name) for api, (_, base, _) in APIS.items() for name in base]
)
def test_what_is_required_is_named(api: str, name: str) -> None:
    assert refusal(api, {name: None}) == f"{name}: it is required"


def content(*parts: Any, role: str = "user", **more: Any) -> Object:
    before = {"role": "system", "content": "Be kind."}
    return {"messages": [before, {"role": role, "content": list(parts), **more}]}


def image(**more: Any) -> Object:
    return {"type": "image_url", "image_url": {"url": "https://media.test/a.png", **more}}


TEXT_PART = {"type": "text", "text": "Hello"}
NESTED: dict[str, tuple[Object, str]] = {
    "low detail": (content(TEXT_PART, image(detail="low")), "messages[1].content[1].image_url.detail"),
    "original detail": (content(image(detail="original")), "messages[1].content[0].image_url.detail"),
    "unknown in image_url": (content(image(uuid="x")), "messages[1].content[0].image_url.uuid"),
    "no URL": (content({"type": "image_url", "image_url": {}}), "messages[1].content[0].image_url.url"),
    "image_url a string": (
        content({"type": "image_url", "image_url": "https://x.test/"}),
        "messages[1].content[0].image_url",
    ),
    "no text": (content({"type": "text"}), "messages[1].content[0].text"),
    "text of another type": (content(TEXT_PART, {"type": "text", "text": 5}), "messages[1].content[1].text"),
    "part beside its kind": (
        content(TEXT_PART | {"cache_control": {}}),
        "messages[1].content[0].cache_control",
    ),
    "image's breakpoint": (
        content(IMAGE | {"prompt_cache_breakpoint": {}}),
        "messages[1].content[0].prompt_cache_breakpoint",
    ),
    "text's breakpoint": (
        content(TEXT_PART | {"prompt_cache_breakpoint": {}}),
        "messages[1].content[0].prompt_cache_breakpoint",
    ),
    "audio": (content({"type": "input_audio", "input_audio": {}}), "messages[1].content[0].type"),
    "file": (content({"type": "file", "file": {}}), "messages[1].content[0].type"),
    "refusal part": (
        content({"type": "refusal", "refusal": "no"}, role="assistant"),
        "messages[1].content[0].type",
    ),
    "video": (content({"type": "video_url", "video_url": {"url": "x"}}), "messages[1].content[0].type"),
    "no kind": (content({"text": "x"}), "messages[1].content[0].type"),
    "kind of another type": (content({"type": 5}), "messages[1].content[0].type"),
    "a part that is none": (content("Hello"), "messages[1].content[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content null": ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "unknown role": ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    "tool": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    "function": ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role"),
    "unknown in a message": (content(TEXT_PART, weight=1), "messages[1].weight"),
    "calls": (content(TEXT_PART, role="assistant", tool_calls=[{"id": "1"}]), "messages[1].tool_calls"),
    "a call": (
        content(TEXT_PART, role="assistant", function_call={"name": "f"}),
        "messages[1].function_call",
    ),
    "audio of an answer": (content(TEXT_PART, role="assistant", audio={"id": "1"}), "messages[1].audio"),
    "a refusal": (content(TEXT_PART, role="assistant", refusal="no"), "messages[1].refusal"),
    "reasoning": (
        content(TEXT_PART, role="assistant", reasoning_content="x"),
        "messages[1].reasoning_content",
    ),
    "name of another type": (content(TEXT_PART, name=5), "messages[1].name"),
    "a second salt": ({"nvext": {"cache_salt": 5}}, "nvext.cache_salt"),
    "a bias": ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
}


@pytest.mark.parametrize("case", NESTED)
def test_what_is_deep_inside_is_named_as_the_client_wrote_it(case: str) -> None:
    fields, place = NESTED[case]
    assert refusal("chat", fields).partition(":")[0] == place


def test_every_part_and_field_of_openais_messages_is_decided() -> None:
    roles = {
        typing.get_args(typing.get_type_hints(kind)["role"])[0]
        for kind in typing.get_args(message_params.ChatCompletionMessageParam)
    }
    assert roles == {"developer", "system", "user", "assistant", "tool", "function"}
    kinds = {
        typing.get_args(typing.get_type_hints(kind)["type"])[0]
        for kind in typing.get_args(part_params.ChatCompletionContentPartParam)
    }
    assert kinds == {"text", "image_url", "input_audio", "file"}
    assert names(user_params.ChatCompletionUserMessageParam) == {"content", "role", "name"}
    assert names(assistant_params.ChatCompletionAssistantMessageParam) == {
        *("content", "role", "name", "audio", "function_call", "refusal", "tool_calls")
    }
    assert names(image_params.ImageURL) == {"url", "detail"}
    assert names(image_params.ChatCompletionContentPartImageParam) == {
        *("image_url", "type", "prompt_cache_breakpoint")
    }
    assert names(text_part_params.ChatCompletionContentPartTextParam) == {
        "text",
        "type",
        "prompt_cache_breakpoint",
    }


def test_an_earlier_answer_is_taken_as_it_was_sent() -> None:
    """What the client library makes of an answer of ours: nulls and empty lists for what it does not have."""
    said = {
        "role": "assistant",
        "content": "A cat.",
        **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "reasoning_content")),
        "annotations": [],
    }
    read("chat", {"messages": [{"role": "user", "content": "What is it?"}, said]})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"top_logprobs": 2}, "top_logprobs: only with logprobs"),
        ({"stream_options": {}}, "stream_options: only with stream"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs: not with stream"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "give one of them"),
        ({"continue_final_message": True}, "only with add_generation_prompt set to false"),
    ],
)
def test_fields_that_do_not_agree(fields: Object, says: str) -> None:
    assert says in refusal("chat", fields)


def test_the_longest_name_of_a_field_does_not_make_the_longest_error() -> None:
    assert "this server does not serve it" in refusal("chat", {"x" * 100_000: 1})
