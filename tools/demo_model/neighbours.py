"""The tower's second lesson: what stands in the cells next to one's own.

An image token of the decoder sees only those before it, so what is right of a cell or below it has to
be in the cell's embedding already. Four linear maps, one a direction, that are thrown away after
training, have to read it there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from .cells import reading_loss, words_of_cells
from .pictures import Scene

_STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))


class NeighbourProbe(nn.Module):
    """Reads the words of the cells to the left, to the right, above and below from an image token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in _STEPS)

    def loss(
        self, model: Qwen2VLForConditionalGeneration, tokens: torch.Tensor, labels: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return how badly `tokens` `[cells, hidden]` read as `labels`, see `words_of_neighbours`."""
        losses = [
            reading_loss(model, linear(tokens), words)
            for linear, words in zip(self.maps, labels, strict=True)
        ]
        return torch.stack(losses).mean()


def words_of_neighbours(scenes: Sequence[Scene]) -> list[list[list[str]]]:
    """Return for each direction the words for the content of every cell's neighbour, none at the edge."""
    return [
        [
            _content(cells, scene, row + down, column + right)
            for scene in scenes
            for cells in [words_of_cells(scene)]
            for row in range(scene.rows)
            for column in range(scene.columns)
        ]
        for down, right in _STEPS
    ]


def _content(cells: Sequence[Sequence[str]], scene: Scene, row: int, column: int) -> list[str]:
    if not (0 <= row < scene.rows and 0 <= column < scene.columns):
        return []
    words = cells[row * scene.columns + column]
    return list(words[:1] if words[0] == "nothing" else words[:2])
