"""What an encode worker announces, held against the image: right answers pass, others do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.engines.conftest import Halves
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, ItemDescription
from trtllm_mm_cache.errors import EmbeddingMismatchError

SIZES = [(64, 64), (112, 40), (333, 97), (40, 500), (1000, 700), (3, 3)]


def announce(halves: Halves, image: ItemDescription, encoded: EncodedItem, **changes: object) -> None:
    rows, width = encoded.tensor.shape
    announced = {"shape": (rows, width), "dtype": encoded.tensor.dtype, "metadata": encoded.metadata}
    halves.generator.check_embedding(image, **(announced | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_the_embedding_of_the_image_passes_upright_or_turned(halves: Halves, size: tuple[int, int]) -> None:
    variant = halves.generator.variant(1)
    encoded = halves.encode(EncodeItem(Image.new("RGB", size, "grey"), variant=variant))
    announce(halves, ItemDescription(*size, variant=variant), encoded)
    announce(halves, ItemDescription(*size[::-1], variant=variant), encoded)  # as EXIF may say


def test_other_rows_width_dtype_or_text_do_not(halves: Halves) -> None:
    encoded = halves.encode(EncodeItem(Image.new("RGB", (112, 40)), variant=halves.generator.variant(1)))
    image, (rows, width) = ItemDescription(112, 40), encoded.tensor.shape
    for changes in (
        {"shape": (rows + 1, width)},
        {"shape": (rows - 1, width)},
        {"shape": (rows, width + 1)},
        {"shape": (width, rows)},
        {"dtype": torch.float16},
        {"metadata": replace(encoded.metadata, placeholder=None)},
        {"metadata": replace(encoded.metadata, placeholder="no image token")},
    ):
        with pytest.raises(EmbeddingMismatchError):
            announce(halves, image, encoded, **changes)


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_with_a_grid_another_images_embedding_does_not(halves_of: object, architecture: str) -> None:
    halves: Halves = halves_of(architecture)  # type: ignore[operator]
    encoded = halves.encode(EncodeItem(Image.new("RGB", (112, 448))))
    for other in ((224, 224), (112, 112)):  # the first has as many patches
        with pytest.raises(EmbeddingMismatchError, match="grid"):
            announce(halves, ItemDescription(*other), encoded)
    asked = {"max_pixels": 4000}
    if architecture != "qwen3_vl":  # its smallest size is larger
        smaller = halves.encode(EncodeItem(Image.new("RGB", (600, 400)), processor_kwargs=asked))
        announce(halves, ItemDescription(600, 400, asked), smaller)
        with pytest.raises(EmbeddingMismatchError, match="grid"):
            announce(halves, ItemDescription(600, 400), smaller)
