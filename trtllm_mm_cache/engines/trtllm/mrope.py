"""Positions of Qwen's multimodal rotary embedding, computed from the grids of a prompt's images.

A cached embedding knows its grid; positions belong to a prompt, since an image's first position depends
on everything before it. So they are computed anew for each request, from the cached grids.

Text advances all three axes (time, height, width) together. An image of `h x w` merged patches occupies
the positions `start + (0, row, column)`, and the text after it goes on at `start + max(h, w)`. That is
what Hugging Face's `get_rope_index` gives for images of Qwen2.5-VL and of Qwen3-VL, which differ for
videos only; `tests/engines/trtllm/test_mrope.py` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Grid = tuple[int, int, int]
"""Patches of one image: time (always 1), height, width, before spatial merging."""


@dataclass(frozen=True)
class MropePositions:
    """`position_ids` is int64 `[3, 1, length]` for the expanded prompt.

    `delta` is what a generated token adds to its index to get its position.
    """

    position_ids: npt.NDArray[np.int64]
    delta: int


def merged_rows(grid: Grid, merge_size: int) -> int:
    """Return how many rows of an embedding an image of `grid` patches has."""
    return grid[0] * grid[1] * grid[2] // merge_size**2


def mrope_positions(
    token_ids: Sequence[int], image_token_id: int, grids: Sequence[Grid], merge_size: int
) -> MropePositions:
    """Return the positions of a prompt that has one `image_token_id` for each of `grids`, in order.

    The i-th image token stands for `merged_rows(grids[i])` rows. O(expanded length). Raises `ValueError`
    when tokens and grids disagree in number.
    """
    pieces: list[npt.NDArray[np.int64]] = []
    images = np.flatnonzero(np.asarray(token_ids, dtype=np.int64) == image_token_id).tolist()
    next_token = position = 0
    for index, grid in zip(images, grids, strict=True):
        pieces.append(_text(position, index - next_token))
        position += index - next_token
        height, width = grid[1] // merge_size, grid[2] // merge_size
        pieces.append(np.indices((grid[0], height, width), dtype=np.int64).reshape(3, -1) + position)
        position += max(height, width)
        next_token = index + 1
    pieces.append(_text(position, len(token_ids) - next_token))
    joined = np.concatenate(pieces, axis=1)
    return MropePositions(joined[:, np.newaxis, :], int(joined.max()) + 1 - joined.shape[1])


def _text(start: int, length: int) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int64), (3, length))
