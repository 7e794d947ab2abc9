"""What a model's embeddings and prompts look like, from the configuration that the engine has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_mm_cache.engines.trtllm.mrope import Grid, merged_rows
from trtllm_mm_cache.errors import ConfigurationError, EmbeddingMismatchError


@dataclass(frozen=True)
class ModelLayout:
    """`width` is an embedding's: `hidden * (1 + deepstack levels)`, one wide row as the engine takes it.

    `image_token_id` is the image's placeholder, `video_token_id` one the engine would take for an
    image's, or None. `merge_size`: patches a side that the vision tower merges into one row.
    `context`: longest prompt with its answer in tokens.
    """

    width: int
    image_token_id: int
    video_token_id: int | None
    merge_size: int
    context: int

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The image's placeholder, and others that the engine would take for one."""
        others = () if self.video_token_id is None else (self.video_token_id,)
        return (self.image_token_id, *others)

    @classmethod
    def of(cls, config: Any) -> ModelLayout:
        """Read a Hugging Face configuration. Raises `ConfigurationError` when it is a part of one only."""
        text = getattr(config, "text_config", config)
        image_token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        vision = getattr(config, "vision_config", None)
        if image_token_id is None or vision is None:
            raise ConfigurationError(
                "TensorRT-LLM's input processor has no configuration of the whole model: this release is not "
                "one that the engine was written for"
            )
        levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return cls(
            width=text.hidden_size * (1 + levels),
            image_token_id=image_token_id,
            video_token_id=getattr(config, "video_token_id", None),
            merge_size=getattr(vision, "spatial_merge_size", 1),
            context=text.max_position_embeddings,
        )

    def check(self, shape: Sequence[int], dtype: torch.dtype, item_index: int | None = None) -> None:
        """Raise `EmbeddingMismatchError` unless this is `[rows, width]` of a floating dtype."""
        if len(shape) != 2 or shape[1] != self.width or not dtype.is_floating_point:
            raise EmbeddingMismatchError(
                f"the embedding is {dtype} {list(shape)}, this model takes [rows, {self.width}]",
                item_index=item_index,
            )

    def grid_from_positions(self, position_ids: torch.Tensor, rows: int) -> Grid | None:
        """Return the grid of the only image in a prompt of `marker, rows image tokens, marker`.

        `position_ids` is `[3, 1, rows + 2]`, as the engine's own preprocessing made it. None when it
        does not describe one image of that many rows.
        """
        if position_ids.dim() != 3 or position_ids.shape[-1] != rows + 2:
            return None
        image = position_ids[:, 0, 1:-1]
        sides = (image.amax(dim=1) - image.amin(dim=1) + 1).tolist()
        grid = (1, int(sides[1]) * self.merge_size, int(sides[2]) * self.merge_size)
        return grid if merged_rows(grid, self.merge_size) == rows else None


def embedding_dtype_name(config: Any, dtype: str) -> str:
    """Return the dtype of embeddings when the engine is told `dtype` ("auto" is the model's own)."""
    if dtype != "auto":
        return dtype
    text = getattr(config, "text_config", None)
    # transformers 4 says torch_dtype; 5 says dtype, and warns of the other.
    for name in ("dtype", "torch_dtype"):
        for part in (text, config):
            value = getattr(part, name, None)
            if value is not None:
                return str(value).removeprefix("torch.")
    raise ConfigurationError("the model's configuration names no dtype: set dtype in the engine's YAML files")
