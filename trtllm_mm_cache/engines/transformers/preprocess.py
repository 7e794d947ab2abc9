"""One image to the vision tower's input, the text its placeholder becomes, and its embedding's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from trtllm_mm_cache.engines.base import EmbeddingShape, EncodeItem
from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.engines.huggingface.architectures import (
    MULTI_IMAGE,
    Architecture,
    architecture_of,
)
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import load_config, load_processor
from trtllm_mm_cache.engines.huggingface.processor_kwargs import configured_bounds, image_kwargs
from trtllm_mm_cache.engines.transformers.settings import torch_dtype
from trtllm_mm_cache.errors import InvalidImageError

_ENCODED_AS = {"qwen3_vl_moe": "qwen3_vl"}
"""Architectures that TensorRT-LLM serves and this engine does not, by one of ours with the same encoder."""


@dataclass(frozen=True)
class ProcessedImage:
    """The tower's input for one image.

    `inputs` are tensors whose first dimension counts patches, tiles or images, by the processor's
    output names. `placeholder` is the exact text that the model's processor puts where the prompt has
    this image's placeholder; it holds `rows` image tokens. `grid` is `[t, h, w]` in patches, or None.
    """

    inputs: Mapping[str, torch.Tensor]
    placeholder: str
    rows: int
    grid: tuple[int, int, int] | None


class ImagePreprocessor:
    """Thread-safe: the processor's image part keeps no state between calls.

    With a `device`, which needs the torchvision backend, it resizes and normalises there.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: PreTrainedConfig,
        architecture: Architecture,
        device: torch.device | None = None,
    ) -> None:
        self._processor = processor
        self._architecture = architecture
        self._where = {} if device is None else {"device": device}
        self._bounds = configured_bounds(processor)
        self._image_token = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)

    def __call__(self, item: EncodeItem) -> ProcessedImage:
        """Run the model's processor over one image.

        Raises `InvalidRequestError` for the item's kwargs, `InvalidImageError` for its image.
        """
        kwargs = image_kwargs(item.processor_kwargs, self._architecture.request_kwargs, self._bounds)
        if item.image.mode != "RGB":
            # Some released configurations leave this open, and then only RGB images pass.
            kwargs["do_convert_rgb"] = True
        images = [item.image]
        if item.variant == MULTI_IMAGE:
            # The processor looks at how many images a prompt has; a second one of a pixel says "several".
            images.append(Image.new("RGB", (1, 1)))
        try:
            output = self._processor(
                images=[images],
                text=self._processor.image_token * len(images),
                images_kwargs=kwargs | self._where,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError, OSError, ArithmeticError, LookupError) as error:
            width, height = item.image.size
            reason = fit_for_client(error, f"its processor refuses {width}x{height} pixels")
            raise InvalidImageError(f"the model cannot take this image: {reason}") from error
        return self._processed(output, alone=len(images) == 1)

    def _processed(self, output: Mapping[str, Any], *, alone: bool) -> ProcessedImage:
        placeholder = output["text_replacement_offsets"][0][0]["replacement"]
        inputs = {
            name: value if alone or name == "batch_num_images" else value[:1]
            for name, value in output.items()
            if isinstance(value, torch.Tensor)
        }
        grid = None
        if self._architecture.has_grid:
            time, height, width = inputs["image_grid_thw"][0].tolist()
            grid = (time, height, width)
        return ProcessedImage(inputs, placeholder, placeholder.count(self._image_token), grid)


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
    item = EncodeItem(
        Image.new("RGB", size, "grey"), processor_kwargs, architecture.variant(images_in_prompt)
    )
    processed = preprocess(item)
    layout = FeatureLayout.of(config, architecture, torch_dtype(dtype))
    return EmbeddingShape(processed.rows, layout.hidden * (1 + layout.levels), layout.dtype)
