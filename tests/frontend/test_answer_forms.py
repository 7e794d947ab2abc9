"""Answers are what OpenAI's own types say, strictly: nothing missing, of another type, or more."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import CompletionChoice
from openai.types.model import Model
from pydantic import BaseModel, TypeAdapter

from tests.frontend.serving import PeerPdWorkers, events, serving, token_messages
from trtllm_mm_cache.errors import PdLostError
from trtllm_mm_cache.frontend.answer import Answer, ChatForm, Delta, Object, TextForm
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.prompt_logprobs import json_in_steps

SAID = "A cat 😀 sat.\n猫"


@pytest.fixture(scope="session")
def prompts(prompts_of: Callable[[str], Prompts]) -> Prompts:
    return prompts_of("qwen2_vl")


def answer_of(
    prompts: Prompts, *, logprobs: bool = False, stop: Sequence[str] = (), choices: int = 1
) -> Answer:
    texts = [prompts.answer_text([], stop, skip_special_tokens=True) for _ in range(choices)]
    return Answer("0123", "tiny", texts, prompts.backend, logprobs=logprobs)


async def stream(messages: Sequence[Any]) -> AsyncIterator[Mapping[str, Any]]:
    for message in messages:
        yield message


def with_logprobs(message: Any, alternatives: int) -> Any:
    ids = message["token_ids"]
    more: Object = {"log_probs": [-0.5] * len(ids)}
    if alternatives:
        more["top_logprobs"] = [
            [
                {"rank": rank, "token_id": 10 + rank, "logprob": -float(rank)}
                for rank in range(1, alternatives + 1)
            ]
            for _ in ids
        ]
    return {**message, **more}


def check(kind: type[BaseModel], content: Object, *, but: set[str] | None = None) -> BaseModel:
    """Validate as OpenAI's client never does, and find fields that its types do not have."""
    checked = TypeAdapter(kind).validate_python(content, strict=True)
    assert not (unknown(checked) - (but or set())), unknown(checked)
    return checked


def unknown(value: Any) -> set[str]:
    if isinstance(value, BaseModel):
        inner = [unknown(getattr(value, name)) for name in type(value).model_fields]
        return set(value.model_extra or {}).union(*inner)
    if isinstance(value, list):
        return set().union(*map(unknown, value))
    return set()


@pytest.mark.parametrize("alternatives", [None, 0, 2])
@pytest.mark.parametrize("items", [None, {"hits": 1, "misses": 0, "hit_rows": 4}])
async def test_chat(prompts: Prompts, alternatives: int | None, items: Object | None) -> None:
    messages = token_messages(prompts, SAID, size=2)
    if alternatives is not None:
        messages = [with_logprobs(message, alternatives) for message in messages]
    answer = answer_of(prompts, logprobs=alternatives is not None)
    whole_form, stream_form = ChatForm(answer), ChatForm(answer)
    deltas, chunks = [], []
    async for delta in answer.deltas(stream([{}, *([{"items": items}] if items else []), *messages])):
        deltas.append(delta)
        chunks.append(check(ChatCompletionChunk, stream_form.chunk(delta)))
    whole = check(ChatCompletion, whole_form.whole(deltas))
    usage = check(ChatCompletionChunk, stream_form.usage_chunk())
    assert isinstance(whole, ChatCompletion)
    assert isinstance(usage, ChatCompletionChunk)
    (choice,) = whole.choices
    assert choice.message.content == SAID
    assert choice.finish_reason == "stop"
    assert whole.usage == usage.usage
    assert whole.usage is not None
    count = len(prompts.backend.encode(SAID).ids)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, count)
    cached = whole.usage.prompt_tokens_details
    assert (cached and cached.cached_tokens) == (4 if items else None)
    assert (choice.logprobs is None) == (alternatives is None)
    if choice.logprobs and choice.logprobs.content:
        content = choice.logprobs.content
        assert len(content) == count
        assert all(len(each.top_logprobs) == alternatives for each in content)
        assert bytes(byte for each in content for byte in each.bytes or ()).decode(errors="replace")
    streamed = [
        chunk.choices[0] for chunk in chunks if isinstance(chunk, ChatCompletionChunk) and chunk.choices
    ]
    assert "".join(each.delta.content or "" for each in streamed) == SAID
    assert [each.delta.role for each in streamed] == ["assistant"] + [None] * (len(streamed) - 1)
    if alternatives is not None:
        assert sum(len(each.logprobs.content or ()) for each in streamed if each.logprobs) == count


async def test_text(prompts: Prompts) -> None:
    answer = answer_of(prompts)
    form = TextForm(answer)
    deltas, chunks = [], []
    async for delta in answer.deltas(stream(token_messages(prompts, SAID))):
        deltas.append(delta)
        chunks.append(form.chunk(delta))
    whole = check(Completion, form.whole(deltas))
    check(Completion, form.usage_chunk())
    assert isinstance(whole, Completion)
    assert whole.choices[0].text == SAID
    for chunk in chunks[:-1]:
        # OpenAI's own type says that even an unfinished choice has finished; it sends null, and so do we.
        assert chunk["choices"][0]["finish_reason"] is None
        check(Completion, chunk | {"choices": [chunk["choices"][0] | {"finish_reason": "stop"}]})
    assert isinstance(check(Completion, chunks[-1]), Completion)
    assert CompletionChoice(**chunks[-1]["choices"][0]).finish_reason == "stop"


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_the_reason_of_the_end_is_the_workers(prompts: Prompts, reason: str) -> None:
    answer = answer_of(prompts)
    deltas = [delta async for delta in answer.deltas(stream(token_messages(prompts, SAID, reason=reason)))]
    whole = check(ChatCompletion, ChatForm(answer).whole(deltas))
    assert isinstance(whole, ChatCompletion)
    assert whole.choices[0].finish_reason == reason


@pytest.mark.parametrize("form", [ChatForm, TextForm])
async def test_several_choices_are_told_apart(prompts: Prompts, form: type[ChatForm | TextForm]) -> None:
    """The first ends at a stop string, though the worker goes on with it; the second by its length."""
    first, second = (
        token_messages(prompts, "A cat sat."),
        token_messages(prompts, "Two dogs.", reason="length"),
    )
    pairs = zip_longest(first, second)
    messages = [
        {**message, "index": index}
        for pair in pairs
        for index, message in enumerate(pair)
        if message is not None
    ]
    answer = answer_of(prompts, stop=["sat"], choices=2)
    forms = form(answer), form(answer)
    deltas = [delta async for delta in answer.deltas(stream(messages))]
    whole = forms[0].whole(deltas)
    check(ChatCompletion if form is ChatForm else Completion, whole)
    said = [
        choice["message"]["content"] if form is ChatForm else choice["text"] for choice in whole["choices"]
    ]
    assert said == ["A cat ", "Two dogs."]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    chunks = [forms[1].chunk(delta)["choices"][0] for delta in deltas]
    for index, text in enumerate(said):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        pieces = [(chunk["delta"] if form is ChatForm else chunk).get("content", "") for chunk in mine]
        assert "".join(pieces if form is ChatForm else [chunk["text"] for chunk in mine]) == text
        assert [chunk["finish_reason"] is None for chunk in mine] == [True] * (len(mine) - 1) + [False]
        if form is ChatForm:
            assert [chunk["delta"].get("role") for chunk in mine] == ["assistant"] + [None] * (len(mine) - 1)
    assert answer.usage_object()["completion_tokens"] == answer.tokens > len(second)


async def test_an_answer_with_a_choice_missing_is_an_error(prompts: Prompts) -> None:
    answer = answer_of(prompts, choices=2)
    with pytest.raises(PdLostError):
        [delta async for delta in answer.deltas(stream(token_messages(prompts, SAID)))]


@pytest.mark.parametrize("form", [ChatForm, TextForm])
async def test_log_probabilities_of_the_prompt_are_in_vllms_form(
    prompts: Prompts, form: type[ChatForm | TextForm]
) -> None:
    """They come in pieces. A token's own entry is there though it is none of the likeliest."""
    one, another = prompts.backend.encode("cat sat", add_special_tokens=False).ids[:2]
    entries = {str(one): {"logprob": -9.5, "rank": 77}, str(another): {"logprob": -0.5, "rank": 1}}
    pieces = [{"token_ids": [], "engine_data": {"prompt_logprobs": piece}} for piece in ([None], [entries])]
    answer = answer_of(prompts, choices=2)
    said = [{**message, "index": index} for index in (0, 1) for message in token_messages(prompts, SAID)]
    deltas = [delta async for delta in answer.deltas(stream([*pieces, *said]))]
    whole = form(answer).whole(deltas)
    texts = {str(token): prompts.backend.decode([token]) for token in (one, another)}
    expected = [None, {name: {**entry, "decoded_token": texts[name]} for name, entry in entries.items()}]
    if form is ChatForm:
        assert whole["prompt_logprobs"] == expected
    else:
        assert [choice["prompt_logprobs"] for choice in whole["choices"]] == [expected] * 2
    assert answer.tokens == 2 * len(prompts.backend.encode(SAID).ids)
    assert json.loads(json_in_steps(whole)) == json.loads(json.dumps(whole))


async def test_without_being_asked_for_nothing_is_said_of_the_prompt(prompts: Prompts) -> None:
    answer = answer_of(prompts)
    deltas = [delta async for delta in answer.deltas(stream(token_messages(prompts, SAID)))]
    assert "prompt_logprobs" not in ChatForm(answer).whole(deltas)
    assert "prompt_logprobs" not in TextForm(answer).whole(deltas)["choices"][0]


async def test_what_the_engine_had_of_the_prompt_is_what_was_cached(prompts: Prompts) -> None:
    answer = answer_of(prompts)
    (message,) = token_messages(prompts, SAID, size=1000)
    message["completion_usage"]["prompt_tokens_details"] = {"cached_tokens": 3}
    async for _ in answer.deltas(stream([{"items": {"hits": 1, "misses": 0, "hit_rows": 4}}, message])):
        pass
    assert answer.usage_object()["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_an_empty_answer_is_one(prompts: Prompts) -> None:
    answer = answer_of(prompts)
    deltas = [delta async for delta in answer.deltas(stream([{"token_ids": [], "finish_reason": "stop"}]))]
    check(ChatCompletion, ChatForm(answer).whole(deltas))
    check(ChatCompletionChunk, ChatForm(answer).chunk(Delta("")))


async def test_what_is_held_back_comes_with_the_end(prompts: Prompts) -> None:
    answer = answer_of(prompts, stop=["sat down"])
    deltas = [delta async for delta in answer.deltas(stream(token_messages(prompts, "A cat sat do")))]
    assert "".join(delta.text for delta in deltas) == "A cat sat do"


async def test_messages_that_end_too_early_are_a_lost_worker(prompts: Prompts) -> None:
    answer = answer_of(prompts)
    with pytest.raises(PdLostError):
        _ = [delta async for delta in answer.deltas(stream(token_messages(prompts, SAID)[:-1]))]


async def test_the_list_of_models(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        models = (await up.client.get("/v1/models")).json()["data"]
    for model in models:
        check(Model, model, but={"parent"})


async def test_over_http_too(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(token_messages(prompts, SAID))) as up:
        asked = {"model": "tiny", "prompt": "Once", "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage, done = events((await up.client.post("/v1/completions", json=asked)).text)
        whole = (await up.client.post("/v1/completions", json={"model": "tiny", "prompt": "Once"})).json()
    assert done == "[DONE]"
    check(Completion, whole)
    check(Completion, usage)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == SAID
