"""Rows of a decoder's batch: one prompt's beginning with several endings, as padded tensors.

An ending sees the beginning and itself, at the positions it would have alone: what is learned is exactly
the one-question prompt that serving sends, several times for one encode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from .hints import hint, second_hint
from .pictures import Scene
from .questions import ORDINALS, Question


@dataclass(frozen=True)
class Row:
    """One beginning with its endings: which scenes of the batch, and what is asked about them."""

    scenes: tuple[int, ...]
    questions: tuple[Question, ...]


class RowWriter:
    """Rows to padded tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = functools.cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._ids = ids
        self._image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._pad = tokenizer.pad_token_id

    def write(self, scenes: Sequence[Scene], rows: Sequence[Row]) -> tuple[Any, ...]:
        """Return the fields of `Batch` up to `answer_lengths`, then hints and ordinals.

        Of the last two: indices into the flattened rows, and the words that are to be readable there;
        of hints also those that are to be readable a layer later.
        """
        first = np.cumsum([0, *(scene.rows * scene.columns for scene in scenes)])
        written = [self._row(row, scenes, first) for row in rows]
        length = max(len(row.ids) for row in written)
        ids = np.full((len(rows), length), self._pad)
        images = np.full((len(rows), length), -1)
        ending = np.full((len(rows), length), -1)
        target = np.full((len(rows), length), -1)
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for index, row in enumerate(written):
            size = len(row.ids)
            ids[index, :size], images[index, :size] = row.ids, row.images
            ending[index, :size], target[index, :size] = row.endings, row.targets
            positions[:, index, :size] = np.array(row.positions).T
        predict_at = np.flatnonzero(target.reshape(-1) >= 0)
        return (
            torch.from_numpy(ids),
            torch.from_numpy(images),
            torch.from_numpy(positions),
            _mask(torch.from_numpy(ending)),
            torch.from_numpy(predict_at),
            torch.from_numpy(target.reshape(-1)[predict_at]),
            [len(self._answer(question)) for row in rows for question in row.questions],
            [
                (index * length + position, words, neighbour)
                for index, row in enumerate(written)
                for position, words, neighbour in row.hints
            ],
            [
                (index * length + position, [word])
                for index, row in enumerate(written)
                for position, word in row.ordinals
            ],
        )

    def _answer(self, question: Question) -> list[int]:
        return self._ids(f"{question.answer}<|im_end|>")

    def _row(self, row: Row, scenes: Sequence[Scene], first: NDArray[np.int64]) -> _WrittenRow:
        """Return `row` as lists; the image tokens of scene `index` start at `first[index]`."""
        written = _WrittenRow()
        written.text([*self._ids("<|im_start|>"), *self._ids("user\n")])
        for ordinal, index in zip(ORDINALS, row.scenes, strict=False):
            written.text(self._ids("<|vision_start|>"))
            if len(row.scenes) > 1:
                tokens = scenes[index].rows * scenes[index].columns
                written.ordinals += [(len(written.ids) + token, ordinal) for token in range(tokens)]
            written.image(self._image, first[index], scenes[index].rows, scenes[index].columns)
            written.text(self._ids("<|vision_end|>"))
        begin = written.now
        pictures = [scenes[index] for index in row.scenes]
        for number, question in enumerate(row.questions, start=1):
            written.now, written.ending = begin, number
            if (found := hint(pictures, question)) is not None:
                named, words = found
                position = len(written.ids) + len(self._ids(named)) - 1
                written.hints.append((position, words, second_hint(question)))
            asked = self._ids(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._answer(question)
            written.text([*asked, *answer[:-1]], [-1] * (len(asked) - 1) + answer)
        return written


@dataclass
class _WrittenRow:
    """A row as lists, one entry a token. `now` is the next position, `ending` 0 in the beginning."""

    now: int = 0
    ending: int = 0
    ids: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    endings: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    hints: list[tuple[int, list[str], list[str]]] = field(default_factory=list)
    ordinals: list[tuple[int, str]] = field(default_factory=list)

    def text(self, ids: Sequence[int], targets: Sequence[int] | None = None) -> None:
        """Append text tokens."""
        self.positions += [(self.now + step,) * 3 for step in range(len(ids))]
        self.now += len(ids)
        self._append(ids, [-1] * len(ids), targets)

    def image(self, token: int, first: int, rows: int, columns: int) -> None:
        """Append the tokens of one picture, at mRoPE's positions."""
        self.positions += [
            (self.now, self.now + row, self.now + column) for row in range(rows) for column in range(columns)
        ]
        self.now += max(rows, columns)
        count = rows * columns
        self._append([token] * count, list(range(first, first + count)), None)

    def _append(self, ids: Sequence[int], images: Sequence[int], targets: Sequence[int] | None) -> None:
        self.ids += ids
        self.images += images
        self.endings += [self.ending] * len(ids)
        self.targets += targets or [-1] * len(ids)


def _mask(ending: torch.Tensor) -> torch.Tensor:
    """Return who may look at whom: earlier tokens of the beginning (0) and of the same ending."""
    length = ending.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = ending[:, :, None] == ending[:, None, :]
    beginning = (ending == 0)[:, None, :]
    return (earlier & (same | beginning))[:, None]
