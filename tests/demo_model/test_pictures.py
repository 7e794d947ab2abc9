"""What a scene says is what its picture shows, judged from the pixels alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from skimage.measure import label, regionprops

from tools.demo_model.pictures import CELL, COLOURS, GRIDS, Scene, draw, random_scene

SCENES = [random_scene(random.Random(seed)) for seed in range(120)]


def test_a_seed_decides_every_pixel() -> None:
    for seed in range(10):
        first, again = (draw(random_scene(random.Random(seed))) for _ in range(2))
        assert first.tobytes() == again.tobytes()
    assert len({draw(scene).tobytes() for scene in SCENES}) == len(SCENES)


def test_sizes_and_shapes_of_pictures_differ() -> None:
    assert {(scene.rows, scene.columns) for scene in SCENES} == set(GRIDS)
    for scene in SCENES:
        assert draw(scene).size == scene.size == (scene.columns * CELL, scene.rows * CELL)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"look{scene.look}")
def test_the_pixels_show_what_the_scene_says(scene: Scene) -> None:
    pixels = np.asarray(draw(scene)).astype(int)
    background = pixels[3, 3]
    marked = np.abs(pixels - background).max(-1) > 60
    marked[:2], marked[-2:], marked[:, :2], marked[:, -2:] = False, False, False, False
    things = [region for region in regionprops(label(marked)) if region.area >= 12]
    digits = len(scene.number.digits) if scene.number else 0
    assert len(things) == len(scene.figures) + digits
    seen = {}
    for thing in things:
        colours = pixels[tuple(thing.coords.T)]
        distances = {
            name: np.abs(np.median(colours, axis=0) - colour).sum() for name, colour in COLOURS.items()
        }
        row, column = (int(centre // CELL) for centre in thing.centroid)
        seen[row, column] = min(distances, key=distances.__getitem__)
    truth = {(figure.row, figure.column): figure.colour for figure in scene.figures}
    if scene.number is not None:
        for column in range(scene.number.column, scene.number.column + digits):
            truth[scene.number.row, column] = scene.number.colour
    assert seen == truth


def test_shapes_can_be_told_apart_by_how_much_they_fill() -> None:
    """A circle fills pi/4 of its box, a square all, a ring has a hole; averaged over many, to be safe."""
    filled: dict[str, list[float]] = {}
    holes: dict[str, set[int]] = {}
    for scene in SCENES:
        pixels = np.asarray(draw(scene)).astype(int)
        for figure in scene.figures:
            top, left = figure.row * CELL, figure.column * CELL
            cell = np.abs(pixels[top : top + CELL, left : left + CELL] - pixels[3, 3]).max(-1) > 60
            cell[:2], cell[-2:], cell[:, :2], cell[:, -2:] = False, False, False, False
            (thing,) = (region for region in regionprops(label(cell)) if region.area >= 12)
            filled.setdefault(figure.shape, []).append(thing.extent)
            holes.setdefault(figure.shape, set()).add(int(thing.euler_number))
    means = {shape: float(np.mean(values)) for shape, values in filled.items()}
    assert means["square"] > 0.93 > means["circle"] > 0.7 > means["triangle"] > means["star"]
    assert holes["ring"] == {0}
    assert all(numbers == {1} for shape, numbers in holes.items() if shape != "ring")
