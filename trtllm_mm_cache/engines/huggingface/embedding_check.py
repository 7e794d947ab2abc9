"""Can this be the embedding of that image? Answered from what an encode worker says, before a byte is read.

Rows must be those that the placeholder's text has room for, in every architecture. Where rows are laid out
by a grid (Qwen), the grid must also be the one that the image's size comes to, by the model's own image
processor; elsewhere the text is believed: the fingerprint says that both workers have one configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.engines.checks import grid_of
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.processor_kwargs import configured_bounds, image_kwargs
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.errors import EmbeddingMismatchError


def placeholder_of(metadata: EmbeddingMetadata, item_index: int | None = None) -> str:
    """Return the text that the item's placeholder expands to. Raises `EmbeddingMismatchError`."""
    if metadata.placeholder is None:
        raise EmbeddingMismatchError("the embedding has no placeholder text", item_index=item_index)
    return metadata.placeholder


@dataclass(frozen=True)
class EmbeddingCheck:
    """`Generator.check_embedding`. Thread-safe; arithmetic only."""

    architecture: Architecture
    layout: FeatureLayout
    expander: PromptExpander

    def __call__(
        self, item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
    ) -> None:
        """Raise `EmbeddingMismatchError` if it cannot be."""
        self.layout.check(shape, dtype, self.expander.rows_of(placeholder_of(metadata)))
        if not self.architecture.has_grid:
            return
        grid = grid_of(metadata, shape[0], self.expander.config.vision_config.spatial_merge_size)
        if grid not in self._grids(item):
            raise EmbeddingMismatchError(
                f"the grid {list(grid)} is not that of an image of {item.width} x {item.height} pixels"
            )

    def _grids(self, item: ItemDescription) -> set[tuple[int, int, int]]:
        """Return the grid that the image processor lays out, for either orientation of the stored image."""
        bounds = configured_bounds(self.expander.processor)
        processor = self.expander.processor.image_processor
        kwargs = image_kwargs(item.processor_kwargs, self.architecture.request_kwargs, bounds)
        size = kwargs.get("size", processor.size)
        grids = set()
        for stored in ((item.height, item.width), (item.width, item.height)):
            height, width = smart_resize(
                *stored,
                factor=processor.patch_size * processor.merge_size,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
            grids.add((1, height // processor.patch_size, width // processor.patch_size))
        return grids
