"""torchvision's image processor: asked for by name, with a fingerprint of its own, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.engines.conftest import ModelFactory
from tests.engines.contract import assert_clearly_different, picture
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.engines.transformers.loading import fingerprint_of
from trtllm_mm_cache.errors import ConfigurationError

PIL = TransformersEngineArgs(device="cpu")
TORCHVISION = TransformersEngineArgs(device="cpu", image_processor="torchvision")
INSTALLED = importlib.util.find_spec("torchvision") is not None


def test_its_embeddings_are_its_own(model_of: ModelFactory) -> None:
    model_dir = model_of("qwen2_vl")
    assert fingerprint_of(model_dir, PIL) != fingerprint_of(model_dir, TORCHVISION)


@pytest.mark.skipif(INSTALLED, reason="torchvision is installed")
def test_without_torchvision_it_is_refused_by_name(model_of: ModelFactory) -> None:
    with pytest.raises(ConfigurationError, match=r"torchvision is not installed.*pil on both workers"):
        TransformersVisionEncoder(model_of("qwen2_vl"), TORCHVISION)


@pytest.mark.skipif(not INSTALLED, reason="torchvision is not installed")
@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen3_vl", "llava", "internvl"])
def test_it_gives_what_pils_gives_but_for_rounding(architecture: str, model_of: ModelFactory) -> None:
    results = []
    for args in (PIL, TORCHVISION):
        encoder = TransformersVisionEncoder(model_of(architecture), args)
        (one,) = encoder.encode([encoder.preprocess(EncodeItem(picture(1, 160, 120), variant=""))])
        (other,) = encoder.encode([encoder.preprocess(EncodeItem(picture(2, 160, 120), variant=""))])
        assert isinstance(one, EncodedItem)
        assert isinstance(other, EncodedItem)
        results.append(one)
        assert_clearly_different(one.tensor, other.tensor)
        encoder.close()
    first, second = results
    assert first.metadata == second.metadata
    assert first.tensor.shape == second.tensor.shape
    likeness = torch.nn.functional.cosine_similarity(first.tensor.flatten(), second.tensor.flatten(), dim=0)
    assert likeness > 0.9
