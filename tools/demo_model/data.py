"""Batches for training: each picture is encoded once and asked about several times (`rows.py`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from .cells import WordTokens, words_of_cells
from .model import IMAGE_PROCESSOR, MERGE, PATCH
from .neighbours import words_of_neighbours
from .pictures import GRIDS, Scene, draw, random_scene
from .questions import Question, ask
from .rows import Row, RowWriter

SINGLE_KINDS = (
    *("colour", "shape", "count", "count", "where", "where", "place", "place", "neighbour", "neighbour"),
    *("number", "number", "exists", "describe"),
)
HARD_KINDS = (
    *("colour", "shape", "where", "place", "exists", "describe", "describe"),
    *("count", "count", "count", "count", "neighbour", "neighbour", "neighbour", "neighbour"),
    *("number", "number", "number"),
)
"""What to ask more of when the other kinds are known."""
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
class Pictures:
    """Pictures of one or more grids, encoded together grid by grid.

    `patches`: for each grid `[pictures, patches, 3 * 14 * 14]`; `grids`: its (rows, columns) in patches;
    `cells`: the labels of `cells.py` for the image tokens of all pictures, in order; `neighbours`: those of
    `neighbours.py`, one tensor a direction.
    """

    patches: list[torch.Tensor]
    grids: list[tuple[int, int]]
    cells: torch.Tensor
    neighbours: list[torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One step's pictures and what is asked about them.

    `token_ids`, `image_tokens` `[rows, length]`: the latter indexes the image tokens of all pictures
    in order, -1 where the token is text. `positions` `[3, rows, length]`; `mask` `[rows, 1, length,
    length]`, True where a token may look. `predict_at` indexes the flattened rows, `targets` what
    follows there: answer after answer, each `answer_lengths` tokens long, to a question of `kinds`.
    `hint_at` indexes the flattened rows too, `hint_words` are the labels of `hints.py` for them,
    `second_hint_words` those for a layer later;
    `ordinal_at` the image tokens of pairs, `ordinal_words` says `first` or `second` of them.
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
    hint_at: torch.Tensor
    hint_words: torch.Tensor
    second_hint_words: torch.Tensor
    ordinal_at: torch.Tensor
    ordinal_words: torch.Tensor


class BatchMaker:
    """Makes the batch of each step; the same seed and step give the same batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, shape: BatchShape) -> None:
        self._seed = seed
        self._shape = shape
        self._writer = RowWriter(tokenizer)
        self._words = WordTokens(tokenizer)

    def pictures(self, step: int) -> Pictures:
        """Return the pictures of `step`."""
        return self._pictures(self._scenes(self._rng(step)))

    def rows(self, step: int, kinds: Sequence[str] = SINGLE_KINDS) -> tuple[list[Scene], list[Row]]:
        """Return the scenes of `step`, and rows that ask `kinds` about each and `PAIR_KINDS` about pairs."""
        rng = self._rng(step)
        scenes = self._scenes(rng)
        rows = [
            Row((index,), _questions([scene], kinds, self._shape.questions, rng))
            for index, scene in enumerate(scenes)
        ]
        for _ in range(self._shape.pairs):
            pair = tuple(rng.sample(range(len(scenes)), 2))
            asked = _questions([scenes[index] for index in pair], PAIR_KINDS, self._shape.questions, rng)
            rows.append(Row(pair, asked))
        return scenes, rows

    def batch(self, step: int, kinds: Sequence[str] = SINGLE_KINDS) -> Batch:
        """Return `rows` as tensors."""
        scenes, rows = self.rows(step, kinds)
        *tensors, hints, ordinals = self._writer.write(scenes, rows)
        asked = [question.kind for row in rows for question in row.questions]
        lessons = []
        for lesson in (hints, ordinals):
            at, *words = zip(*lesson, strict=True)
            lessons += [torch.tensor(at), *map(self._words.labels, words)]
        return Batch(self._pictures(scenes), *tensors, asked, *lessons)

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
            self._words.labels([words for scene in scenes for words in words_of_cells(scene)]),
            [self._words.labels(words) for words in words_of_neighbours(scenes)],
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
