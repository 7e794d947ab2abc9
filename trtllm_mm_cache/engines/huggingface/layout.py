"""What every embedding of a model must look like, whichever engine takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.errors import EmbeddingMismatchError


@dataclass(frozen=True)
class FeatureLayout:
    """What every embedding of a model must look like: `[rows, hidden * (1 + levels)]` of `dtype`.

    Columns `0..hidden` are what replaces the placeholder's token embeddings; each further block of
    `hidden` columns is one deepstack level.
    """

    hidden: int
    levels: int
    dtype: torch.dtype
    as_tensor: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: Architecture, dtype: torch.dtype) -> FeatureLayout:
        """Return the layout of a model whose embeddings are stored as `dtype`."""
        levels = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
        return cls(config.get_text_config().hidden_size, levels, dtype, architecture.features_as_tensor)

    def check(
        self, shape: Sequence[int], dtype: torch.dtype, rows: int, item_index: int | None = None
    ) -> None:
        """Raise `EmbeddingMismatchError` unless shape and dtype are those of an embedding of `rows` rows."""
        wanted = (rows, self.hidden * (1 + self.levels))
        if tuple(shape) != wanted or dtype != self.dtype:
            raise EmbeddingMismatchError(
                f"the embedding is {dtype} {list(shape)}, this model takes {self.dtype} {list(wanted)}",
                item_index=item_index,
            )
