"""Questions about one or two cards, each with its one true answer: no torch, no model.

`ask` is what training, the score table, the demo and the end-to-end tests share.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .pictures import COLOURS, SHAPES, Figure, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second")
PLACE_WORDS = ("top", "bottom", "left", "right", "centre")


@dataclass(frozen=True)
class Question:
    """A question of one `kind` (a key of `KINDS`) and its only right answer."""

    kind: str
    text: str
    answer: str


def ask(scenes: Sequence[Scene], kind: str, rng: random.Random) -> Question | None:
    """Return a question of `kind` about `scenes`, in the order the pictures stand in the prompt.

    None where the kind has no unambiguous question about them: wrong number of pictures, nothing
    to count, no neighbour. Raises `KeyError` for an unknown kind.
    """
    pictures, maker = KINDS[kind]
    if len(scenes) != pictures:
        return None
    found = maker(scenes, rng)
    return None if found is None else Question(kind, *found)


def ask_any(scenes: Sequence[Scene], kinds: Sequence[str], rng: random.Random) -> Question:
    """Return a question of the first of `kinds` in random order that fits; `LookupError` if none does."""
    for kind in rng.sample(kinds, len(kinds)):
        question = ask(scenes, kind, rng)
        if question is not None:
            return question
    raise LookupError(f"none of {', '.join(kinds)} can be asked about these pictures")


_Asked = tuple[str, str] | None


def _wording(rng: random.Random, *wordings: str) -> str:
    return rng.choice(wordings)


def _only(figures: Sequence[Figure], key: Callable[[Figure], str]) -> list[Figure]:
    """Return the figures that nothing else shares its `key` with."""
    counts = Counter(map(key, figures))
    return [figure for figure in figures if counts[key(figure)] == 1]


def place(scene: Scene, row: int, column: int) -> str:
    """Return what answers call a cell: `top left`, `top` (the middle of three), `centre`, ..."""
    vertical = ("top", "bottom") if scene.rows == 2 else ("top", "", "bottom")
    horizontal = ("left", "right") if scene.columns == 2 else ("left", "", "right")
    return f"{vertical[row]} {horizontal[column]}".strip() or "centre"


def at(name: str) -> str:
    """Return `at the top left`, `on the right` or `in the centre` for a place's name."""
    return f"{ {'left': 'on', 'right': 'on', 'centre': 'in'}.get(name, 'at') } the {name}"


def _colour(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    (scene,) = scenes
    things = {figure.shape: figure.colour for figure in _only(scene.figures, lambda figure: figure.shape)}
    if scene.number is not None:
        things["number"] = scene.number.colour
    if not things:
        return None
    thing = rng.choice(list(things))
    wordings = ("What colour is the {}?", "Which colour does the {} have?", "Tell me the colour of the {}.")
    return _wording(rng, *wordings).format(thing), things[thing]


def _shape(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    candidates = _only(scenes[0].figures, lambda figure: figure.colour)
    if not candidates:
        return None
    figure = rng.choice(candidates)
    wordings = ("Which shape is {}?", "What shape is the {} thing?", "Name the {} shape.")
    return _wording(rng, *wordings).format(figure.colour), figure.shape


def _count(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    figures = scenes[0].figures
    if not figures:
        return None
    things: dict[str, int] = {"shapes": len(figures)}
    way = rng.random()
    if way < 0.6:
        counts = Counter(figure.shape for figure in figures)
        things = {f"{shape}s" if shape != "cross" else "crosses": counts[shape] for shape in SHAPES}
        if way > 0.35:
            counts = Counter(figure.colour for figure in figures)
            things = {f"{colour} shapes": counts[colour] for colour in COLOURS}
    # Rare counts are asked as often as frequent ones, or "one" would be the answer to guess.
    numbers = sorted(set(things.values()), reverse=True)
    number = 0 if numbers[-1] == 0 and rng.random() < 0.1 else rng.choice([n for n in numbers if n][:3])
    thing = rng.choice([name for name, count in things.items() if count == number])
    wordings = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
    return _wording(rng, *wordings).format(thing), NUMBERS[number]


def _where(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    (scene,) = scenes
    figures = {figure.name: figure for figure in _only(scene.figures, lambda figure: figure.name)}
    figures |= {figure.shape: figure for figure in _only(scene.figures, lambda figure: figure.shape)}
    if not figures:
        return None
    name = rng.choice(list(figures))
    wordings = ("Where is the {}?", "In which place is the {}?", "Where do you see the {}?")
    return _wording(rng, *wordings).format(name), place(scene, figures[name].row, figures[name].column)


def _place(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    (scene,) = scenes
    things = {place(scene, figure.row, figure.column): figure.name for figure in scene.figures}
    if not things:
        return None
    name = rng.choice(list(things))
    if scene.number is None and rng.random() < 0.12:
        name = place(scene, rng.randrange(scene.rows), rng.randrange(scene.columns))
    wordings = ("What is {}?", "What do you see {}?", "Which thing is {}?")
    return _wording(rng, *wordings).format(at(name)), things.get(name, "nothing")


def _neighbour(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    """Ask what stands in the next cell of a figure."""
    figures = scenes[0].figures
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    by_cell = {(figure.row, figure.column): figure for figure in figures}
    found = [
        (relation, figure.name, other.name)
        for figure in _only(figures, lambda figure: figure.name)
        for relation, (down, right) in steps.items()
        if (other := by_cell.get((figure.row + down, figure.column + right))) is not None
    ]
    if not found:
        return None
    relation, name, answer = rng.choice(found)
    wordings = ("What is {} the {}?", "What do you see {} the {}?", "Which thing is {} the {}?")
    return _wording(rng, *wordings).format(relation, name), answer


def _number(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    number = scenes[0].number
    if number is None:
        return None
    wordings = ("Which number is in the picture?", "What number do you see?", "Read the number.")
    return _wording(rng, *wordings), number.digits


def _exists(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    figures = scenes[0].figures
    if not figures:
        return None
    present = {figure.name for figure in figures}
    figure, truth = rng.choice(figures), rng.random() < 0.5
    name = figure.name
    if not truth:
        # One property of something that is there and one that is not its own: guessing from either fails.
        near = [f"{figure.colour} {shape}" for shape in SHAPES]
        near += [f"{colour} {figure.shape}" for colour in COLOURS]
        name = rng.choice([other for other in near if other not in present])
    article = "an" if name[0] == "o" else "a"
    wordings = ("Is there {} {}?", "Do you see {} {}?", "Does the picture show {} {}?")
    return _wording(rng, *wordings).format(article, name), "yes" if truth else "no"


def _describe(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    (scene,) = scenes
    if len(scene.figures) > 3:
        return None
    parts = [f"{figure.name} {at(place(scene, figure.row, figure.column))}" for figure in scene.figures]
    if scene.number is not None:
        parts.insert(0, f"the number {scene.number.digits} in {scene.number.colour}")
    text = _wording(rng, "Describe the picture.", "What is in the picture?", "What do you see?")
    return text, ", ".join(parts)


def _which_picture(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    names = [_names(scene) for scene in scenes]
    position = rng.randrange(2)
    only = sorted(names[position] - names[1 - position])
    if not only:
        return None
    wordings = ("Which picture has the {}?", "Which of the two pictures shows the {}?")
    wordings += ("In which picture is the {}?",)
    return _wording(rng, *wordings).format(rng.choice(only)), f"the {ORDINALS[position]}"


def _names(scene: Scene) -> set[str]:
    return {figure.name for figure in scene.figures} | ({"number"} if scene.number else set())


def _in_one_picture(scenes: Sequence[Scene], rng: random.Random) -> _Asked:
    position = rng.randrange(2)
    kinds = ("colour", "shape", "count", "where", "place", "number")
    question = ask_any([scenes[position]], kinds, rng)
    ordinal, text = ORDINALS[position], question.text
    return (
        _wording(
            rng,
            f"In the {ordinal} picture: {text}",
            f"Look at the {ordinal} picture. {text}",
            f"{text} I mean the {ordinal} picture.",
        ),
        question.answer,
    )


KINDS: Mapping[str, tuple[int, Callable[[Sequence[Scene], random.Random], _Asked]]] = {
    "colour": (1, _colour),
    "shape": (1, _shape),
    "count": (1, _count),
    "where": (1, _where),
    "place": (1, _place),
    "neighbour": (1, _neighbour),
    "number": (1, _number),
    "exists": (1, _exists),
    "describe": (1, _describe),
    "which picture": (2, _which_picture),
    "in one picture": (2, _in_one_picture),
}
"""Kind to the number of pictures it is about and its maker."""
