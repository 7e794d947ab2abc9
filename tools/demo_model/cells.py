"""The first lesson: every image token reads as the words for its cell.

Learning to see and to answer at once starts with a long plateau, because an answer says little about
which token mattered. Here each image token, read by the decoder's own word table, has to give the
words for what its cell shows and where it is. Afterwards pictures and words share a space: the decoder
finds `circle` in a picture as it finds it in a question.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from .pictures import COLOURS, SHAPES, Scene
from .questions import PLACE_WORDS, place


class CellWords:
    """Knows the tokens of each cell's words, as they stand at the start of a text and inside it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        words = (*COLOURS, *SHAPES, *PLACE_WORDS, "nothing", *map(str, range(10)))
        self._tokens = {word: _forms(tokenizer, word) for word in words}

    def labels(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """Return `[cells, words]`: token ids for each cell in reading order, padded with -1."""
        cells = [self._cell(words) for scene in scenes for words in _words(scene)]
        return torch.tensor(list(zip(*itertools.zip_longest(*cells, fillvalue=-1), strict=True)))

    def _cell(self, words: Sequence[str]) -> list[int]:
        return [token for word in words for token in self._tokens[word]]


def _forms(tokenizer: PreTrainedTokenizerFast, word: str) -> list[int]:
    forms = [word] if word.isdigit() else [word, f" {word}"]
    tokens = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    if any(len(form) != 1 for form in tokens):
        raise ValueError(f"the tokenizer splits {word!r}")
    return [form[0] for form in tokens]


def _words(scene: Scene) -> list[list[str]]:
    """Return the words of each cell, in reading order: content and place."""
    contents = {(figure.row, figure.column): [figure.colour, figure.shape] for figure in scene.figures}
    if (number := scene.number) is not None:
        for column, digit in enumerate(number.digits, start=number.column):
            contents[number.row, column] = [number.colour, digit]
    return [
        contents.get((row, column), ["nothing"]) + place(scene, row, column).split()
        for row in range(scene.rows)
        for column in range(scene.columns)
    ]


def cell_loss(
    model: Qwen2VLForConditionalGeneration, image_tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return how badly `image_tokens` `[cells, hidden]` read as their words.

    At best it is the mean of the log of how many words a cell has.
    """
    logits = model.lm_head(model.model.language_model.norm(image_tokens))
    wanted = labels >= 0
    found = logits.log_softmax(-1).gather(1, labels.clamp(min=0))
    return -(found * wanted).sum() / wanted.sum()
