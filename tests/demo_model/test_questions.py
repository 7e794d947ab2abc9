"""Every question has one answer, and it is true: worked out here a second way, from the scene's cells."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tools.demo_model.pictures import COLOURS, SHAPES, Figure, Scene, random_scene
from tools.demo_model.questions import KINDS, Question, ask

PLACES = {
    (2, 2): ["top left", "top right", "bottom left", "bottom right"],
    (2, 3): ["top left", "top", "top right", "bottom left", "bottom", "bottom right"],
    (3, 2): ["top left", "top right", "left", "right", "bottom left", "bottom right"],
    (3, 3): [
        "top left",
        "top",
        "top right",
        "left",
        "centre",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    ],
}


def asked(kind: str, count: int = 200) -> list[tuple[tuple[Scene, ...], Question]]:
    """Return questions of `kind` about random scenes, the same in every run."""
    rng = random.Random(kind)
    found: list[tuple[tuple[Scene, ...], Question]] = []
    while len(found) < count:
        scenes = tuple(random_scene(rng) for _ in range(KINDS[kind][0]))
        if (question := ask(scenes, kind, rng)) is not None:
            found.append((scenes, question))
    return found


def words(text: str) -> list[str]:
    return text.lower().replace("?", "").replace(".", "").split()


def places(scene: Scene) -> dict[str, Figure]:
    """Return the figures by what their cell is called."""
    names = PLACES[scene.rows, scene.columns]
    return {names[figure.row * scene.columns + figure.column]: figure for figure in scene.figures}


def named(scene: Scene, text: str) -> list[Figure]:
    """Return the figures that fit every colour and shape in `text`."""
    said = [word.removesuffix("es") if word == "crosses" else word.rstrip("s") for word in words(text)]
    said = ["cross" if word == "cro" else word for word in said]
    colours = [word for word in said if word in COLOURS]
    shapes = [word for word in said if word in SHAPES]
    return [
        figure
        for figure in scene.figures
        if all(figure.colour == colour for colour in colours)
        and all(figure.shape == shape for shape in shapes)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_asked_in_several_wordings_and_has_several_answers(kind: str) -> None:
    questions = [question for _, question in asked(kind)]
    assert {question.kind for question in questions} == {kind}
    assert len({question.text for question in questions}) >= 3
    most = Counter(question.answer for question in questions).most_common(1)[0][1] / len(questions)
    assert most < (0.65 if kind in ("exists", "which picture") else 0.5)


def test_no_question_where_nothing_fits() -> None:
    rng = random.Random(0)
    empty = Scene(2, 2, (Figure("circle", "red", 0, 0),) * 1, None, 0)
    assert ask([empty], "number", rng) is None
    assert ask([empty], "neighbour", rng) is None
    assert ask([empty], "which picture", rng) is None
    with pytest.raises(KeyError):
        ask([empty], "smell", rng)


def test_colours_and_shapes() -> None:
    for (scene,), question in asked("colour"):
        if "number" in question.text:
            assert scene.number is not None
            assert question.answer == scene.number.colour
        else:
            assert [figure.colour for figure in named(scene, question.text)] == [question.answer]
    for (scene,), question in asked("shape"):
        assert [figure.shape for figure in named(scene, question.text)] == [question.answer]


def test_counts() -> None:
    numbers = ["zero", "one", "two", "three", "four", "five", "six"]
    for (scene,), question in asked("count"):
        assert numbers.index(question.answer) == len(named(scene, question.text)), question


def test_places() -> None:
    for (scene,), question in asked("where"):
        assert [name for name, figure in places(scene).items() if figure in named(scene, question.text)] == [
            question.answer
        ]
    for (scene,), question in asked("place"):
        name = question.text.rpartition(" the ")[2].removesuffix("?")
        figure = places(scene).get(name)
        assert question.answer == (f"{figure.colour} {figure.shape}" if figure else "nothing")


def test_neighbours() -> None:
    for (scene,), question in asked("neighbour"):
        relation, _, name = question.text.removesuffix("?").rpartition(" the ")
        (figure,) = named(scene, name)
        (other,) = (
            other
            for other in scene.figures
            if {
                "left": (other.row, other.column + 1),
                "right": (other.row, other.column - 1),
                "above": (other.row + 1, other.column),
                "below": (other.row - 1, other.column),
            }[next(word for word in words(relation) if word in ("left", "right", "above", "below"))]
            == (figure.row, figure.column)
        )
        assert question.answer == f"{other.colour} {other.shape}"


def test_numbers_existence_and_descriptions() -> None:
    for (scene,), question in asked("number"):
        assert scene.number is not None
        assert question.answer == scene.number.digits
    for (scene,), question in asked("exists"):
        assert question.answer == ("yes" if named(scene, question.text) else "no")
    for (scene,), question in asked("describe"):
        assert all(figure.name in question.answer for figure in scene.figures)
        assert question.answer.count(",") + 1 == len(scene.figures) + (scene.number is not None)


def test_two_pictures() -> None:
    for scenes, question in asked("which picture"):
        if "number" in question.text:
            present = [scene.number is not None for scene in scenes]
        else:
            present = [bool(named(scene, question.text)) for scene in scenes]
        assert present in ([True, False], [False, True])
        assert question.answer == ("the first" if present[0] else "the second")
    for scenes, question in asked("in one picture"):
        scene = scenes["second" in words(question.text.replace(":", ""))]
        if question.answer in COLOURS and "number" not in question.text:
            assert [figure.colour for figure in named(scene, question.text)] == [question.answer]
