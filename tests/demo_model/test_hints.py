"""What the decoder is told on its way is true, and told at the word that completes the name."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from tools.demo_model.hints import hint, second_hint
from tools.demo_model.pictures import Scene, random_scene
from tools.demo_model.questions import KINDS, Question, ask
from tools.demo_model.tokenizer import make_tokenizer

ALWAYS = ("colour", "shape", "count", "where", "place", "neighbour", "number", "in one picture")
ANSWER_AMONG_THEM = ("colour", "shape", "count", "where", "place", "in one picture")


def asked(kind: str, count: int = 100) -> Iterator[tuple[Sequence[Scene], Question]]:
    rng = random.Random(f"hints of {kind}")
    while count:
        scenes = [random_scene(rng) for _ in range(KINDS[kind][0])]
        if (question := ask(scenes, kind, rng)) is not None:
            count -= 1
            yield scenes, question


@pytest.mark.parametrize("kind", ALWAYS)
def test_every_question_that_names_something_is_hinted_at(kind: str) -> None:
    assert all(hint(scenes, question) is not None for scenes, question in asked(kind))


@pytest.mark.parametrize("kind", ANSWER_AMONG_THEM)
def test_the_answer_is_among_what_is_true_of_the_named_thing(kind: str) -> None:
    for scenes, question in asked(kind):
        found = hint(scenes, question)
        assert found is not None
        words = [word for said in found[1] for word in said.split()]
        digits = list(question.answer) if question.answer.isdigit() else question.answer.split()
        assert set(digits) <= set(words), (question, words)


def test_a_hint_ends_with_a_token_of_the_prompt() -> None:
    """Training finds its place by the number of tokens, so the text up to it must be cut as the whole is."""
    tokenizer = make_tokenizer()
    for kind in KINDS:
        for scenes, question in asked(kind, 40):
            if (found := hint(scenes, question)) is not None:
                beginning = tokenizer(found[0])["input_ids"]
                assert tokenizer(question.text)["input_ids"][: len(beginning)] == beginning, found


def test_which_picture_is_meant_may_come_last() -> None:
    texts = {
        hinted[0]
        for scenes, question in asked("in one picture")
        if "I mean" in question.text and (hinted := hint(scenes, question))
    }
    assert texts
    assert all(text.endswith(("I mean the first", "I mean the second")) for text in texts)


def test_a_neighbour_is_hinted_at_twice() -> None:
    for scenes, question in asked("neighbour"):
        found = hint(scenes, question)
        assert found is not None
        named = question.text.rpartition(" the ")[2].removesuffix("?")
        assert found[1][:2] == named.split()
        assert second_hint(question) == question.answer.split()
    assert not any(second_hint(question) for _, question in asked("where", 20))
