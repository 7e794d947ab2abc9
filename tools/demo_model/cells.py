"""The first lesson: every image token reads as the words for its cell.

Learning to see and to answer at once starts with a long plateau, because an answer says little about
which token mattered. Here each image token, read by the decoder's own word table, has to give the
words for what its cell shows and where it is. Afterwards pictures and words share a space: the decoder
finds `circle` in a picture as it finds it in a question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

from .pictures import Scene
from .questions import place


class WordTokens:
    """Knows the tokens of words, as they stand at the start of a text and inside it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[str, list[int]] = {}

    def labels(self, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return `[texts, tokens]`: the tokens of each text's words, padded with -1."""
        rows = [[token for word in text for token in self._of(word)] for text in texts]
        width = max(1, *map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows])

    def _of(self, word: str) -> list[int]:
        if word not in self._tokens:
            forms = (
                self._tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f" {word}")
            )
            self._tokens[word] = [form[0] for form in forms if len(form) == 1]
            if not self._tokens[word]:
                raise ValueError(f"the tokenizer splits {word!r}")
        return self._tokens[word]


def words_of_cells(scene: Scene) -> list[list[str]]:
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


def reading_loss(
    model: Qwen2VLForConditionalGeneration, hidden: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return how badly `hidden` `[texts, hidden]` read as the words of `labels`, see `WordTokens.labels`.

    At best it is the mean of the log of how many tokens a text has.
    """
    logits = model.lm_head(model.model.language_model.norm(hidden))
    wanted = labels >= 0
    found = logits.log_softmax(-1).gather(1, labels.clamp(min=0))
    return -(found * wanted).sum() / wanted.sum().clamp(min=1)
