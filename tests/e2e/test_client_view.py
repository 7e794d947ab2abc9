"""What a client of the OpenAI library meets: true statuses with their reasons, and what the cache did."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.cards import Deal
from tests.e2e.image_server import ImageServer, image_server
from tests.e2e.stack import Stack, data_url, image_part, message, new_image, png, wait_until

QUESTION = "What is this?"
MB = 1024**2


def ask(stack: Stack, *parts: Any, **options: Any) -> Any:
    """Ask; return the raw answer, with its headers."""
    settings = {"max_tokens": 4, "messages": [message(*parts)], "model": stack.model} | options
    return stack.client.chat.completions.with_raw_response.create(**settings)


def cached(answer: Any) -> tuple[str | None, int]:
    """Return what an answer says of the cache: by its header, and by its usage."""
    details = answer.parse().usage.prompt_tokens_details
    return answer.headers.get("x-mm-cache"), details.cached_tokens if details else 0


def test_a_fresh_hit_makes_no_connection_from_any_process(stack: Stack, images: ImageServer) -> None:
    images.max_age = 600
    url = images.put("/card.png?signature=secret", png(new_image()))
    ask(stack, url, QUESTION)
    assert images.answers == {"/card.png?signature=secret": [200]}
    assert images.connections == 1
    for _ in range(3):
        ask(stack, url, QUESTION)
    with stack.client.chat.completions.create(
        model=stack.model, messages=[message(url, QUESTION)], max_tokens=2, stream=True
    ) as chunks:
        assert list(chunks)
    assert images.connections == 1
    assert images.answers == {"/card.png?signature=secret": [200]}


def test_a_redirect_tells_the_other_host_nothing(stack: Stack, images: ImageServer) -> None:
    with image_server() as other:
        images.redirects["/signed?token=secret"] = other.put("/there.png", png(new_image()))
        ask(stack, f"{images.url}/signed?token=secret", QUESTION)
        assert images.answers == {"/signed?token=secret": [302]}
        assert other.answers == {"/there.png": [200]}
        for head in (*images.heads, *other.heads):
            assert "referer" not in head
            assert "range" not in head
        assert "secret" not in json.dumps(other.heads)
    for process in stack.processes:
        assert "token=secret" not in process.log.read_text()
        assert str(images.url) not in process.log.read_text()


def test_a_file_below_our_limit_is_served_however_it_comes(stack: Stack, images: ImageServer) -> None:
    """17 MB, by our flags' defaults alone: there is no other limit before them."""
    body = png(new_image()) + bytes(17 * MB)
    assert ask(stack, data_url(body), QUESTION).http_response.status_code == 200
    assert cached(ask(stack, images.put("/large.png", body), QUESTION))[0] == "hits=1, misses=0"


def test_the_client_sees_what_the_cache_did(stack: Stack) -> None:
    known, new = new_image(), new_image()
    first = ask(stack, known, QUESTION)
    assert cached(first) == ("hits=0, misses=1", 0)
    header, tokens = cached(ask(stack, known, QUESTION))
    assert header == "hits=1, misses=0"
    assert 0 < tokens < first.parse().usage.prompt_tokens
    assert cached(ask(stack, known, new, QUESTION)) == ("hits=1, misses=1", tokens)
    assert cached(ask(stack, QUESTION)) == (None, 0)


def test_a_stream_tells_it_too(stack: Stack) -> None:
    known = new_image()
    ask(stack, known, QUESTION)
    answer = ask(stack, known, QUESTION, stream=True, stream_options={"include_usage": True})
    assert answer.headers["x-mm-cache"] == "hits=1, misses=0"
    *_, last = answer.parse()
    assert last.usage.prompt_tokens_details.cached_tokens > 0


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"},
        "tool",
    ),
    "audio": ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
    "several answers": ({"n": 2}, "n:"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "storing": ({"store": True}, "store"),
    "prediction": ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    "web": ({"web_search_options": {}}, "web_search_options"),
    "unknown": ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", FIELDS)
def test_nothing_that_is_asked_for_is_ignored(stack: Stack, case: str, stream: bool) -> None:
    options, name = FIELDS[case]
    with pytest.raises(openai.BadRequestError, match=name):
        ask(stack, new_image(), QUESTION, stream=stream, **options)


def test_a_part_that_is_no_text_and_no_image_is_named(stack: Stack) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    said = message(new_image(), QUESTION)
    said["content"].append(sound)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(stack, messages=[said])
    assert refused.value.param == "messages[0].content[2].type"
    assert "input_audio" in str(refused.value)


@pytest.mark.parametrize("top", [None, 0, 3])
def test_log_probabilities_come_one_a_token(stack: Stack, deal: Deal, top: int | None) -> None:
    asked = deal()
    options = {} if top is None else {"top_logprobs": top}
    answer = ask(stack, *asked.parts, logprobs=True, max_tokens=8, temperature=0, **options).parse()
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(each.logprob <= 0 for each in content)
    assert all(len(each.top_logprobs) == (top or 0) for each in content)
    said = b"".join(bytes(each.bytes) for each in content).decode()
    assert said.startswith(asked.answer)
    if top:
        # Greedy: the token that was chosen is the likeliest.
        assert all(each.top_logprobs[0].token == each.token for each in content)


ERRORS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "no image": (data_url(b"hello"), 415, ("image 2",)),
    "truncated": (data_url(png(new_image())[:200]), 400, ("image 2",)),
    "metadata service": ("http://169.254.169.254/latest/", 400, ("image 2",)),
    "other scheme": ("ftp://example.invalid/a.png", 400, ("image 2",)),
    "outside the folder": ("file:///etc/hostname", 400, ("image 2",)),
    "nobody there": ("http://127.0.0.1:9/a.png", 400, ("image 2",)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_has_its_status_its_image_and_its_reason(stack: Stack, case: str, stream: bool) -> None:
    url, status, says = ERRORS[case]
    said = message(new_image(), QUESTION)
    said["content"].insert(1, image_part(url))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(stack, messages=[said], stream=stream)
    assert caught.value.status_code == status
    text = str(caught.value)
    assert all(each in text for each in says)
    assert len(text.partition("image 2: ")[2]) > 10
    assert "retry-after" not in caught.value.response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_models_name_names_the_served_one(stack: Stack, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match=stack.model):
        ask(stack, QUESTION, model="gpt-4o", stream=stream)
    with pytest.raises(openai.NotFoundError, match=stack.model):
        stack.client.completions.create(model="gpt-4o", prompt="Once", stream=stream)
    with pytest.raises(openai.NotFoundError, match=stack.model):
        stack.client.models.retrieve("gpt-4o")


def test_the_responses_api_says_what_is_served(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        stack.client.responses.create(model=stack.model, input="Hello")


def test_plain_completions_continue_the_text(stack: Stack) -> None:
    options: dict[str, Any] = {"model": stack.model, "prompt": "The card shows", "max_tokens": 6}
    options["temperature"] = 0
    whole = stack.client.completions.create(**options)
    pieces = [chunk.choices[0].text for chunk in stack.client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 6
    with pytest.raises(openai.BadRequestError, match="echo"):
        stack.client.completions.create(**options, echo=True)


def test_every_answer_has_an_id_that_its_log_line_has(stack: Stack) -> None:
    name = ask(stack, QUESTION).headers["x-request-id"]
    (frontend,) = [process for process in stack.processes if process.name == "frontend"]
    for processes in ([frontend], stack.workers("PD")):
        wait_until(
            lambda processes=processes: any(name in each.log.read_text() for each in processes), 10, "no line"
        )
