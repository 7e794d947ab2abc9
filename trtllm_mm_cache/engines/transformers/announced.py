"""Can this be the embedding of that image? Answered from what an encode worker says, before a byte is read.

Rows must be those that the placeholder's text has room for, in every architecture. Where rows are laid out
by a grid (Qwen), the grid must also be the one that the image's size comes to, by the model's own image
processor; elsewhere the text is believed: the fingerprint says that both workers have one configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.engines.transformers.architectures import Architecture
from trtllm_mm_cache.engines.transformers.features import FeatureLayout
from trtllm_mm_cache.engines.transformers.processor_kwargs import configured_bounds, image_kwargs
from trtllm_mm_cache.engines.transformers.prompt import PromptExpander
from trtllm_mm_cache.errors import EmbeddingMismatchError


def placeholder_of(metadata: Mapping[str, Any] | None, item_index: int | None = None) -> str:
    """Return the text that the image's placeholder expands to. Raises `EmbeddingMismatchError`."""
    placeholder = (metadata or {}).get("placeholder")
    if not isinstance(placeholder, str):
        raise EmbeddingMismatchError("the embedding has no placeholder text", item_index=item_index)
    return placeholder


def grid_of(
    metadata: Mapping[str, Any] | None, rows: int, merge_size: int, item_index: int | None = None
) -> list[int]:
    """Return the grid `[t, h, w]` in patches that gives `rows` rows. Raises `EmbeddingMismatchError`."""
    grid = (metadata or {}).get("image_grid_thw")
    if not (isinstance(grid, list) and len(grid) == 3 and all(isinstance(n, int) for n in grid)):
        raise EmbeddingMismatchError("the embedding has no grid of patches", item_index=item_index)
    if grid[0] * grid[1] * grid[2] != rows * merge_size**2:
        raise EmbeddingMismatchError(f"the grid {grid} does not give {rows} rows", item_index=item_index)
    return grid


@dataclass(frozen=True)
class EmbeddingCheck:
    """`Generator.check_embedding`. Thread-safe; arithmetic only."""

    processor: ProcessorMixin
    config: PreTrainedConfig
    architecture: Architecture
    layout: FeatureLayout
    expander: PromptExpander

    def __call__(
        self, image: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: Mapping[str, Any]
    ) -> None:
        """Raise `EmbeddingMismatchError` if it cannot be."""
        self.layout.check(shape, dtype, self.expander.rows_of(placeholder_of(metadata)))
        if not self.architecture.has_grid:
            return
        grid = grid_of(metadata, shape[0], self.config.vision_config.spatial_merge_size)
        if tuple(grid) not in self._grids(image):
            raise EmbeddingMismatchError(
                f"the grid {grid} is not that of an image of {image.width} x {image.height} pixels"
            )

    def _grids(self, image: ItemDescription) -> set[tuple[int, int, int]]:
        """Return the grid that the image processor lays out, for either orientation of the stored image."""
        processor = self.processor.image_processor
        kwargs = image_kwargs(
            image.processor_kwargs, self.architecture.request_kwargs, configured_bounds(self.processor)
        )
        size = kwargs.get("size", processor.size)
        grids = set()
        for stored in ((image.height, image.width), (image.width, image.height)):
            height, width = smart_resize(
                *stored,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
            grids.add((1, height // processor.patch_size, width // processor.patch_size))
        return grids
