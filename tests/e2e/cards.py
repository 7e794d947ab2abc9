"""Cards to ask about, each with an answer that is true and that the model gives without any cache.

A wrong, stale or swapped embedding gives another answer. `Deal` leaves out the few questions that the
model gets wrong in one process, so that no test depends on which.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from tools.demo_model.pictures import draw, random_scene
from tools.demo_model.questions import KINDS, ORDINALS, Question, ask

Oracle = Callable[..., str]
MAX_TOKENS = 48
"""More than any answer has."""
_TRIES = 30


@dataclass(frozen=True)
class Asked:
    """A question about `pictures`, and the only right answer."""

    pictures: tuple[Image.Image, ...]
    text: str
    answer: str

    @property
    def parts(self) -> tuple[Image.Image | str, ...]:
        """The message's parts: pictures, then text."""
        return (*self.pictures, self.text)


class Deal:
    """Draws cards that no test has seen; the same ones in the same order for the same `seed`."""

    def __init__(self, oracle: Oracle, seed: int) -> None:
        print(f"cards of seed {seed}")
        self._oracle = oracle
        self._rng = random.Random(seed)

    def __call__(self, kind: str = "place") -> Asked:
        """Return a question of one of `tools.demo_model.questions.KINDS`.

        With another card's embedding, a `place` (what is at the top left?) or a `number` keeps its answer
        by a rare chance only.
        """
        for _ in range(_TRIES):
            if self._knows(asked := self._draw(kind)):
                return asked
        raise AssertionError(f"the demo model answered {_TRIES} questions of the kind {kind!r} wrongly")

    def same_question(self, kind: str = "place") -> tuple[Asked, Asked]:
        """Return two cards that the same words ask about, with different answers."""
        one = self(kind)
        for _ in range(50 * _TRIES):
            other = self._draw(kind)
            if other.text == one.text and other.answer != one.answer and self._knows(other):
                return one, other
        raise AssertionError(f"the demo model answered no second card's {one.text!r} truly")

    def both_orders(self) -> tuple[Asked, Asked]:
        """Return which of two pictures has something, and the same with the pictures swapped."""
        for _ in range(_TRIES):
            one = self("which picture")
            (other,) = (f"the {ordinal}" for ordinal in ORDINALS if ordinal not in one.answer)
            swapped = Asked(one.pictures[::-1], one.text, other)
            if self._knows(swapped):
                return one, swapped
        raise AssertionError(f"the demo model did not tell the order of {_TRIES} pairs of pictures")

    def _draw(self, kind: str) -> Asked:
        pictures, _ = KINDS[kind]
        question: Question | None = None
        while question is None:
            scenes = [random_scene(self._rng) for _ in range(pictures)]
            question = ask(scenes, kind, self._rng)
        return Asked(tuple(map(draw, scenes)), question.text, question.answer)

    def _knows(self, asked: Asked) -> bool:
        return self._oracle(asked.pictures, _texts(asked), MAX_TOKENS) == asked.answer


def _texts(asked: Asked) -> Sequence[str]:
    """Return the texts around the pictures: none but the question, after them."""
    return [""] * len(asked.pictures) + [asked.text]
