"""How large an embedding will be, from a model's configuration and processor; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trtllm_mm_cache.engines.base import EmbeddingShape, EncodeItem
from trtllm_mm_cache.engines.transformers.architectures import MULTI_IMAGE, SINGLE_IMAGE, architecture_of
from trtllm_mm_cache.engines.transformers.features import FeatureLayout
from trtllm_mm_cache.engines.transformers.loading import load_config
from trtllm_mm_cache.engines.transformers.preprocess import ImagePreprocessor
from trtllm_mm_cache.engines.transformers.processor import load_processor
from trtllm_mm_cache.engines.transformers.settings import torch_dtype

_ENCODED_AS = {"qwen3_vl_moe": "qwen3_vl"}
"""Architectures that TensorRT-LLM serves and this engine does not, by one of ours with the same encoder."""


def embedding_shape(
    model_path: Path,
    size: tuple[int, int],
    processor_kwargs: Mapping[str, Any],
    *,
    images_in_prompt: int,
    dtype: str,
) -> EmbeddingShape:
    """Return the shape for one image of `size` (width, height in pixels), stored as `dtype`.

    The model's own processor runs over a grey image and its placeholders are counted. Blocking: seconds
    with the import of transformers. `images_in_prompt` matters to architectures that process an image
    otherwise when it is not alone. Raises `ConfigurationError` for the model, `InvalidRequestError` for
    the kwargs, `InvalidImageError` for a size that the processor refuses.
    """
    config = load_config(model_path)
    architecture = architecture_of(_ENCODED_AS.get(config.model_type, config.model_type))
    preprocess = ImagePreprocessor(load_processor(model_path, config), config, architecture)
    variant = ""
    if architecture.multi_image_variant:
        variant = SINGLE_IMAGE if images_in_prompt == 1 else MULTI_IMAGE
    processed = preprocess(EncodeItem(Image.new("RGB", size, "grey"), processor_kwargs, variant))
    layout = FeatureLayout.of(config, architecture, torch_dtype(dtype))
    return EmbeddingShape(processed.rows, layout.hidden * (1 + layout.levels), layout.dtype)
