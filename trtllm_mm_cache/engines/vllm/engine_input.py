"""A prompt as vLLM's engine takes it from vLLM's own processors: tokens, and where images lie in them.

No processor of vLLM's runs on it: of an image vLLM is told its identifier, the range of its placeholder, and
its grid where positions are computed from one (`vllm/inputs/engine.py`, 0.32); pixels only where vLLM's own
tower is to encode it.

The identifier is vLLM's own identity of an image, in its encoder cache and in its prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_mm_cache.errors import PlaceholderMismatchError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PlacedImage:
    """An image in an expanded prompt: `length` tokens from `offset`; those of `is_embed` take a row each.

    `is_embed` is None where all of them do.
    """

    offset: int
    length: int
    is_embed: torch.Tensor | None = None


def place_images(token_ids: Sequence[int], image_token_id: int, rows: Sequence[int]) -> list[PlacedImage]:
    """Return where the images of a prompt lie, the i-th of which takes the next `rows[i]` image tokens.

    Raises `PlaceholderMismatchError` when the prompt has another number of image tokens.
    """
    positions = [index for index, token in enumerate(token_ids) if token == image_token_id]
    if len(positions) != sum(rows):
        raise PlaceholderMismatchError(
            f"the prompt has {len(positions)} image tokens with its images expanded, the images' embeddings "
            f"have {sum(rows)} rows"
        )
    placed, taken = [], 0
    for count in rows:
        first, last = positions[taken], positions[taken + count - 1]
        taken += count
        mask = None
        if last - first + 1 != count:
            mask = torch.tensor([token == image_token_id for token in token_ids[first : last + 1]])
        placed.append(PlacedImage(first, last - first + 1, mask))
    return placed


def engine_input(
    token_ids: list[int],
    identifiers: Sequence[str],
    placed: Sequence[PlacedImage],
    images: Sequence[Any],
    cache_salt: str | None,
) -> Any:
    """Return the `EngineInput` of an expanded prompt.

    `images` are what vLLM is told of each besides: `grid_item`, its pixels where its own tower is to encode
    it, or None.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import PlaceholderRange

    if not identifiers:
        return tokens_input(token_ids, cache_salt=cache_salt)
    ranges = [PlaceholderRange(image.offset, image.length, image.is_embed) for image in placed]
    return mm_input(
        token_ids,
        {"image": list(images)},
        {"image": list(identifiers)},
        {"image": ranges},
        cache_salt=cache_salt,
    )


def grid_item(grid: Grid) -> Any:
    """Return what stands for an image without pixels where positions are computed from its grid."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    field = {"image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}
    values = BatchFeature({"image_grid_thw": torch.tensor([grid])})
    return MultiModalKwargsItems.from_hf_inputs(values, field)["image"][0]
