"""What a client may ask for and what it is told: sampling, stopping, mistakes."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import Stack, data_url, image_part, message, new_image, png

QUESTION = "What is this?"


def complete(stack: Stack, *parts: Any, **options: Any) -> Any:
    """Send one message; return the whole answer."""
    settings = {"max_tokens": 12, "messages": [message(*parts)]} | options
    return stack.client.chat.completions.create(model=stack.model, **settings)


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(stack: Stack) -> None:
    picture = new_image()
    answers = [
        complete(stack, picture, QUESTION, temperature=2.0, seed=seed, extra_body={"ignore_eos": True})
        .choices[0]
        .message.content
        for seed in (1, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_the_best_token_alone_is_the_greedy_answer(stack: Stack, deal: Deal) -> None:
    asked = deal()
    assert stack.ask(*asked.parts, temperature=2.0, extra_body={"top_k": 1}) == asked.answer
    assert stack.ask(*asked.parts, temperature=2.0, top_p=1e-6) == asked.answer


def test_a_stop_string_ends_the_answer_before_it(stack: Stack, deal: Deal) -> None:
    asked = deal("describe")
    whole = asked.answer
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    answer = complete(stack, *asked.parts, stop=[stop], max_tokens=48).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_max_tokens_ends_the_answer_with_length(stack: Stack) -> None:
    answer = complete(stack, new_image(), QUESTION, max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_processor_kwargs_are_another_embedding(stack: Stack) -> None:
    picture = new_image(56, 84)
    before = stack.encodes()
    sizes = [{}, {"max_pixels": 56 * 56}, {"min_pixels": 84 * 84}]
    usages = [
        complete(stack, picture, QUESTION, extra_body={"mm_processor_kwargs": kwargs}).usage.prompt_tokens
        for kwargs in sizes
    ]
    assert stack.encodes() == before + 3
    assert usages[1] < usages[0] < usages[2]


def test_a_salt_keeps_tenants_apart(stack: Stack, deal: Deal) -> None:
    asked = deal()
    before = stack.encodes()
    for salt in ("one", "two", "one"):
        assert stack.ask(*asked.parts, extra_body={"cache_salt": salt}) == asked.answer
    assert stack.encodes() == before + 2


CLIENT_MISTAKES = {
    "truncated": (lambda: image_part(data_url(png(new_image())[:200])), "image 2"),
    "no-image": (lambda: image_part(data_url(b"hello")), "accepted format"),
    "empty": (lambda: image_part("data:image/png;base64,"), "image 2"),
    "broken-base64": (lambda: image_part("data:image/png;base64,@@@"), "image 2"),
    "outside-folder": (lambda: image_part("file:///etc/hostname"), "below the folder"),
    "svg": (lambda: image_part(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "accepted format"),
}


@pytest.mark.parametrize("mistake", CLIENT_MISTAKES)
def test_a_bad_image_is_an_error_that_names_it_and_spoils_nothing(stack: Stack, mistake: str) -> None:
    make, says = CLIENT_MISTAKES[mistake]
    good = image_part(data_url(png(new_image())))
    content = [good, make(), {"type": "text", "text": QUESTION}]
    with pytest.raises(openai.APIStatusError) as caught:
        stack.client.chat.completions.create(
            model=stack.model, messages=[{"role": "user", "content": content}], max_tokens=1
        )
    assert caught.value.status_code in (400, 415)
    assert "image 2" in str(caught.value)
    assert says in str(caught.value)
    assert stack.ask(new_image(), QUESTION)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 2}, "n: "),
        ({"extra_body": {"mm_processor_kwargs": {"no_such_option": 1}}}, "no_such_option"),
        ({"extra_body": {"guided_grammar": "root ::= 'a'"}}, "guided_grammar"),
    ],
)
def test_what_is_not_served_is_a_400_that_names_the_field(
    stack: Stack, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        stack.ask(new_image(), QUESTION, **options)


def test_a_literal_placeholder_in_the_text_is_no_image(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError):
        stack.ask(new_image(), "What does <|image_pad|> mean?")
    with pytest.raises(openai.BadRequestError):
        stack.ask("What does <|image_pad|> mean?")


def test_no_url_and_no_image_reaches_a_log(stack: Stack) -> None:
    secret = "https://user-secret.invalid/picture-of-me.png?token=abc123"
    body = png(new_image())
    with pytest.raises(openai.APIStatusError):
        stack.ask(secret, QUESTION)
    stack.ask(data_url(body), QUESTION)
    encoded = data_url(body).partition(",")[2][40:80]
    for process in stack.workers("PD") + stack.workers("encode"):
        text = process.log.read_text()
        assert "user-secret" not in text
        assert "abc123" not in text
        assert encoded not in text
