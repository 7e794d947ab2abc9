"""What a question names, and what is true of it: a lesson for the decoder's first layers.

An answer alone teaches little about the step that matters, finding in the picture what the question
names. At the word that completes the name, half-way through the decoder, the words that are true of
the named thing have to be readable; the rest of the decoder picks from them what was asked for. A
question for a neighbour takes a second step, from the named thing to the next: one layer later the
neighbour has to be readable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .cells import words_of_cells
from .pictures import COLOURS, SHAPES, Scene
from .questions import ORDINALS, PLACE_WORDS, Question, place

_COUNTED = re.compile(r"\w+s(?= are there| do you see|\.)")


def hint(scenes: Sequence[Scene], question: Question) -> tuple[str, list[str]] | None:
    """Return the question's text up to the end of a name, and the words true of what it names.

    None where it names nothing or several things. Where it says only at its end which picture it is
    about, the text ends there.
    """
    found = _hint(scenes, question)
    if found is None or "I mean" not in question.text:
        return found
    return question.text.removesuffix(" picture."), found[1]


def second_hint(question: Question) -> list[str]:
    """Return the words for the neighbour of the named thing if the question asks for it, none otherwise."""
    return question.answer.split() if question.kind == "neighbour" else []


def _hint(scenes: Sequence[Scene], question: Question) -> tuple[str, list[str]] | None:
    text = question.text
    counted = _COUNTED.search(text)
    if counted and text[: counted.start()].lower().count("how many ") + text.count("ount the "):
        return text[: counted.end()], [question.answer]
    if question.kind == "which picture":
        ordinal = question.answer.split()[-1]
        named = _named(scenes[ORDINALS.index(ordinal)], text)
        return named and (named[0], [ordinal, *named[1]])
    return _named(scenes[len(scenes) > 1 and "second" in text], text)


def _named(scene: Scene, text: str) -> tuple[str, list[str]] | None:
    cells = words_of_cells(scene)
    said = [(found.end(), found.group()) for found in re.finditer(r"\w+", text)]
    names = [(end, word) for end, word in said if word in COLOURS or word in SHAPES]
    if names:
        found = [words for words in cells if {word for _, word in names} <= set(words)]
        found = [words for words in found if set(words) & set(SHAPES)] or [["nothing"]]
        return (text[: names[-1][0]], found[0]) if len(found) == 1 else None
    places = [(end, word) for end, word in said if word in PLACE_WORDS]
    if places:
        name = " ".join(word for _, word in places)
        index = _place_names(scene).index(name)
        return text[: places[-1][0]], cells[index]
    for end, word in said:
        if word == "number" and scene.number is not None:
            return text[:end], [scene.number.colour, *dict.fromkeys(scene.number.digits)]
    return None


def _place_names(scene: Scene) -> list[str]:
    return [place(scene, row, column) for row in range(scene.rows) for column in range(scene.columns)]
