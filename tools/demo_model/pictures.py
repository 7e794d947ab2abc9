"""The demo model's pictures: what is on a card (`Scene`) and how it is drawn (`draw`), with Pillow alone.

A card is a grid of two or three rows and columns. Each cell of 28 pixels, the side of one image token,
holds nothing, a coloured shape, or a digit of the card's number. Everything that is asked about a card
(`questions.py`) follows from its `Scene`, so every answer has a truth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (242, 140, 24),
    "yellow": (240, 210, 40),
    "green": (46, 150, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 130, 180),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CELL = 28
"""Pixels."""
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3))
"""Rows and columns of a card: 56 to 84 pixels high and wide."""

_TINTS = ((255, 255, 255), (246, 243, 232), (232, 240, 247), (238, 246, 236), (240, 236, 246))
_SUPERSAMPLING = 4
_FRAME = 2
"""Pixels; drawn around every card."""


@dataclass(frozen=True)
class Figure:
    """One shape on a card, in the cell `row`, `column` (from 0, from the top left)."""

    shape: str
    colour: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """What answers call it: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Number:
    """A number of two or three digits in one colour, one digit a cell, from `column` on to the right."""

    digits: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A card of `rows` by `columns` cells, its `figures` in reading order, and its `number` if it has one.

    `look` decides what no question asks about: background, tints, sizes and small shifts.
    """

    rows: int
    columns: int
    figures: tuple[Figure, ...]
    number: Number | None
    look: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.columns * CELL, self.rows * CELL


def random_scene(rng: random.Random, grid: tuple[int, int] | None = None) -> Scene:
    """Return a scene that `rng` decides; `grid` is one of `GRIDS`, random if None."""
    rows, columns = grid or rng.choice(GRIDS)
    free = [(row, column) for row in range(rows) for column in range(columns)]
    number = None
    if rng.random() < 0.3:
        number = _number(rng, rows, columns)
        taken = {(number.row, number.column + position) for position in range(len(number.digits))}
        free = [cell for cell in free if cell not in taken]
    least = 1 if number is None else 0
    count = rng.randint(least, min(6, len(free)))
    return Scene(rows, columns, _figures(rng, sorted(rng.sample(free, count))), number, rng.getrandbits(32))


def _number(rng: random.Random, rows: int, columns: int) -> Number:
    length = rng.randint(2, columns)
    digits = str(rng.randrange(10 ** (length - 1), 10**length))
    return Number(digits, rng.choice(list(COLOURS)), rng.randrange(rows), rng.randint(0, columns - length))


def _figures(rng: random.Random, cells: Sequence[tuple[int, int]]) -> tuple[Figure, ...]:
    """Fill `cells`; half of the time with few kinds, so that there is something to count."""
    shapes: Sequence[str] = SHAPES
    colours: Sequence[str] = list(COLOURS)
    if rng.random() < 0.5:
        shapes = rng.sample(SHAPES, 2)
        colours = rng.sample(colours, rng.choice((2, 3, 8)))
    return tuple(Figure(rng.choice(shapes), rng.choice(colours), *cell) for cell in cells)


def draw(scene: Scene) -> Image.Image:
    """Return the RGB picture of `scene`; the same scene gives the same pixels with the same Pillow."""
    rng = random.Random(scene.look)
    tint = _jittered(rng, rng.choice(_TINTS), 5)
    width, height = (side * _SUPERSAMPLING for side in scene.size)
    canvas = Image.new("RGB", (width, height), tint)
    pen = ImageDraw.Draw(canvas)
    frame = tuple(channel - 70 for channel in tint)
    pen.rectangle((0, 0, width - 1, height - 1), outline=frame, width=_FRAME * _SUPERSAMPLING)
    for figure in scene.figures:
        _draw_figure(pen, rng, figure)
    if scene.number is not None:
        _draw_number(pen, rng, scene.number)
    return canvas.reduce(_SUPERSAMPLING)


def _jittered(rng: random.Random, colour: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-by, by))) for channel in colour)
    return red, green, blue


def _draw_figure(pen: ImageDraw.ImageDraw, rng: random.Random, figure: Figure) -> None:
    """Draw inside the figure's cell, off its neighbours and the frame."""
    cell = CELL * _SUPERSAMPLING
    radius = cell * rng.uniform(0.28, 0.38)
    slack = cell * 0.42 - radius
    x = (figure.column + 0.5) * cell + rng.uniform(-slack, slack)
    y = (figure.row + 0.5) * cell + rng.uniform(-slack, slack)
    colour = _jittered(rng, COLOURS[figure.colour], 14)
    if figure.shape == "ring":
        pen.ellipse(_box(x, y, radius), outline=colour, width=max(1, round(radius * 0.38)))
    elif figure.shape == "circle":
        pen.ellipse(_box(x, y, radius), fill=colour)
    else:
        pen.polygon(_outline(figure.shape, x, y, radius), fill=colour)


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around (x, y)."""
    if shape == "square":
        side = 0.86
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
    elif shape == "triangle":
        corners = [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "cross":
        arm = 0.3
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        corners = [_turned(point, 90 * turn) for turn in range(4) for point in quarter]
    else:
        corners = [_turned((0.0, -1.0 if tip % 2 == 0 else -0.42), 36 * tip) for tip in range(10)]
    return [(x + radius * dx, y + radius * dy) for dx, dy in corners]


def _turned(point: tuple[float, float], degrees: float) -> tuple[float, float]:
    angle = math.radians(degrees)
    return (
        point[0] * math.cos(angle) - point[1] * math.sin(angle),
        point[0] * math.sin(angle) + point[1] * math.cos(angle),
    )


def _draw_number(pen: ImageDraw.ImageDraw, rng: random.Random, number: Number) -> None:
    """Write the digits in Pillow's own font, so that no font file is needed."""
    cell = CELL * _SUPERSAMPLING
    font = ImageFont.load_default(cell * rng.uniform(0.72, 0.88))
    colour = _jittered(rng, COLOURS[number.colour], 14)
    shift_x, shift_y = (rng.uniform(-0.05, 0.05) * cell for _ in range(2))
    for position, digit in enumerate(number.digits):
        x = (number.column + position + 0.5) * cell + shift_x
        y = (number.row + 0.5) * cell + shift_y
        pen.text((x, y), digit, font=font, anchor="mm", fill=colour, stroke_width=cell * 0.03)
