"""What the clients ask: drawn cards, questions about them, and the one right answer to each.

An answer is right twice over: it is what the whole model says in one process, without this project's code,
and it is the truth about the card. Questions that the model gets wrong are left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.conftest import generate_answer
from tests.e2e.stack import message
from tests.engines.contract import chat_case
from tools.demo_model.pictures import draw, random_scene
from tools.demo_model.questions import KINDS, ask_any

MODEL = Path(__file__).parents[2] / "models/shapes-qwen2-vl"
MAX_TOKENS = 40


@dataclass(frozen=True)
class Question:
    """One user message and its right answer. `pictures` is how many it shows."""

    message: Any
    answer: str
    pictures: int


def make_questions(rng: random.Random, scenes: int, questions: int) -> list[Question]:
    """Return `questions` questions about `scenes` cards, one in five about two cards, and one without any."""
    cards = [random_scene(rng) for _ in range(scenes)]
    text = "Hello there!"
    made = [Question(message(text), generate_answer(chat_case(MODEL, [], [text]), MAX_TOKENS), 0)]
    while len(made) <= questions:
        shown = rng.sample(cards, 2 if len(made) % 5 == 0 else 1)
        kinds = [kind for kind, (pictures, _) in KINDS.items() if pictures == len(shown)]
        question = ask_any(shown, kinds, rng)
        pictures = [draw(card) for card in shown]
        says = generate_answer(chat_case(MODEL, pictures, _texts(len(pictures), question.text)), MAX_TOKENS)
        if says == question.answer:
            made.append(Question(message(*pictures, question.text), question.answer, len(shown)))
    return made


def _texts(pictures: int, question: str) -> Sequence[str]:
    return ["", *[""] * (pictures - 1), question]
