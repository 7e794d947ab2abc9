"""Batches for training: each picture is encoded once and asked about several times.

A row of the decoder's batch is one prompt's beginning (the pictures) with several endings (question
and answer). An ending sees the beginning and itself, at the positions it would have alone: what is
learned is exactly the one-question prompt that serving sends, several times for one encode.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from .cells import CellWords
from .model import IMAGE_PROCESSOR, MERGE, PATCH
from .pictures import GRIDS, Scene, draw, random_scene
from .questions import Question, ask

SINGLE_KINDS = (
    *("colour", "shape", "count", "count", "where", "where", "place", "place", "neighbour", "neighbour"),
    *("number", "number", "exists", "describe"),
)
PAIR_KINDS = ("which picture", "which picture", "in one picture", "in one picture", "in one picture")

_MEAN = np.array(IMAGE_PROCESSOR["image_mean"], dtype=np.float32)
_STD = np.array(IMAGE_PROCESSOR["image_std"], dtype=np.float32)


@dataclass(frozen=True)
class BatchShape:
    """How much one batch holds: `scenes` of each of two sizes, `pairs` rows of two pictures."""

    scenes: int = 6
    pairs: int = 4
    questions: int = 6


@dataclass(frozen=True)
class Row:
    """One beginning with its endings: which scenes of the batch, and what is asked about them."""

    scenes: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Pictures:
    """Pictures of one or more grids, encoded together grid by grid.

    `patches`: for each grid `[pictures, patches, 3 * 14 * 14]`; `grids`: its (rows, columns) in patches;
    `cells`: the labels of `cells.py` for the image tokens of all pictures, in order.
    """

    patches: list[torch.Tensor]
    grids: list[tuple[int, int]]
    cells: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One step's pictures and what is asked about them.

    `token_ids`, `image_tokens` `[rows, length]`: the latter indexes the image tokens of all pictures
    in order, -1 where the token is text. `positions` `[3, rows, length]`; `mask` `[rows, 1, length,
    length]`, True where a token may look. `predict_at` indexes the flattened rows, `targets` what
    follows there: answer after answer, each `answer_lengths` tokens long, to a question of `kinds`.
    """

    pictures: Pictures
    token_ids: torch.Tensor
    image_tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor
    answer_lengths: list[int]
    kinds: list[str]


class BatchMaker:
    """Makes the batch of each step; the same seed and step give the same batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, shape: BatchShape) -> None:
        self._seed = seed
        self._shape = shape
        self._writer = _RowWriter(tokenizer)
        self._words = CellWords(tokenizer)

    def pictures(self, step: int) -> Pictures:
        """Return the pictures of `step`."""
        return self._pictures(self._scenes(self._rng(step)))

    def rows(self, step: int) -> tuple[list[Scene], list[Row]]:
        """Return the scenes of `step` and what is asked about each, and about pairs of them."""
        rng = self._rng(step)
        scenes = self._scenes(rng)
        rows = [
            Row((index,), _questions([scene], SINGLE_KINDS, self._shape.questions, rng))
            for index, scene in enumerate(scenes)
        ]
        for _ in range(self._shape.pairs):
            pair = tuple(rng.sample(range(len(scenes)), 2))
            asked = _questions([scenes[index] for index in pair], PAIR_KINDS, self._shape.questions, rng)
            rows.append(Row(pair, asked))
        return scenes, rows

    def batch(self, step: int) -> Batch:
        """Return `rows` as tensors."""
        scenes, rows = self.rows(step)
        kinds = [question.kind for row in rows for question in row.questions]
        return Batch(self._pictures(scenes), *self._writer.write(scenes, rows), kinds)

    def _rng(self, step: int) -> random.Random:
        return random.Random(f"{self._seed}/{step}")

    def _scenes(self, rng: random.Random) -> list[Scene]:
        grids = rng.choices(GRIDS, k=2)
        return [random_scene(rng, grid) for grid in grids for _ in range(self._shape.scenes)]

    def _pictures(self, scenes: Sequence[Scene]) -> Pictures:
        groups = [scenes[: self._shape.scenes], scenes[self._shape.scenes :]]
        return Pictures(
            [torch.from_numpy(patches_of(group)) for group in groups],
            [(group[0].rows * MERGE, group[0].columns * MERGE) for group in groups],
            self._words.labels(scenes),
        )


def _questions(
    scenes: Sequence[Scene], kinds: Sequence[str], count: int, rng: random.Random
) -> tuple[Question, ...]:
    """Return up to `count` different questions about `scenes`, of kinds in random order."""
    found: dict[str, Question] = {}
    for kind in rng.sample(kinds, len(kinds)):
        question = ask(scenes, kind, rng)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return tuple(found.values())


def patches_of(scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """Return `[pictures, patches, 588]`: scenes of one size as the model's image processor sees them.

    The second, equal frame that the processor adds is left out; see `tower.py`.
    """
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes]).astype(np.float32)
    pixels = (pixels / 255 - _MEAN) / _STD
    count, height, width, channels = pixels.shape
    side = PATCH * MERGE
    blocks = pixels.reshape(count, height // side, MERGE, PATCH, width // side, MERGE, PATCH, channels)
    blocks = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return np.ascontiguousarray(blocks).reshape(count, -1, channels * PATCH * PATCH)


class _RowWriter:
    """Rows to padded tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = functools.cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._ids = ids
        self._image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._pad = tokenizer.pad_token_id

    def write(self, scenes: Sequence[Scene], rows: Sequence[Row]) -> tuple[Any, ...]:
        """Return the fields of `Batch` from `token_ids` to `answer_lengths`."""
        grids = [(scene.rows, scene.columns) for scene in scenes]
        first = np.cumsum([0, *(height * width for height, width in grids)])
        written = [self._row(row, grids, first) for row in rows]
        length = max(len(row[0]) for row in written)
        ids = np.full((len(rows), length), self._pad)
        images = np.full((len(rows), length), -1)
        ending = np.full((len(rows), length), -1)
        target = np.full((len(rows), length), -1)
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for index, (row_ids, row_images, row_ending, row_target, row_positions) in enumerate(written):
            size = len(row_ids)
            ids[index, :size], images[index, :size] = row_ids, row_images
            ending[index, :size], target[index, :size] = row_ending, row_target
            positions[:, index, :size] = np.array(row_positions).T
        predict_at = np.flatnonzero(target.reshape(-1) >= 0)
        return (
            torch.from_numpy(ids),
            torch.from_numpy(images),
            torch.from_numpy(positions),
            _mask(torch.from_numpy(ending)),
            torch.from_numpy(predict_at),
            torch.from_numpy(target.reshape(-1)[predict_at]),
            [len(self._answer(question)) for row in rows for question in row.questions],
        )

    def _answer(self, question: Question) -> list[int]:
        return self._ids(f"{question.answer}<|im_end|>")

    def _row(
        self, row: Row, grids: Sequence[tuple[int, int]], first: NDArray[np.int64]
    ) -> tuple[list[Any], ...]:
        """Return token ids, image tokens, endings (0 is the beginning), targets and positions of `row`."""
        ids = [*self._ids("<|im_start|>"), *self._ids("user\n")]
        images = [-1] * len(ids)
        positions = [(step,) * 3 for step in range(len(ids))]
        now = len(ids)
        for scene in row.scenes:
            height, width = grids[scene]
            tokens = height * width
            ids += [*self._ids("<|vision_start|>"), *[self._image] * tokens, *self._ids("<|vision_end|>")]
            images += [-1, *range(first[scene], first[scene] + tokens), -1]
            start, now = now + 1, now + 2 + max(height, width)
            positions.append((start - 1,) * 3)
            positions += [(start, start + y, start + x) for y in range(height) for x in range(width)]
            positions.append((now - 1,) * 3)
        ending, target = [0] * len(ids), [-1] * len(ids)
        for number, question in enumerate(row.questions, start=1):
            asked = self._ids(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._answer(question)
            size = len(asked) + len(answer) - 1
            ids += [*asked, *answer[:-1]]
            target += [*[-1] * (len(asked) - 1), *answer]
            images += [-1] * size
            ending += [number] * size
            positions += [(now + step,) * 3 for step in range(size)]
        return ids, images, ending, target, positions


def _mask(ending: torch.Tensor) -> torch.Tensor:
    """Return who may look at whom: earlier tokens of the beginning (0) and of the same ending."""
    length = ending.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = ending[:, :, None] == ending[:, None, :]
    beginning = (ending == 0)[:, None, :]
    return (earlier & (same | beginning))[:, None]
