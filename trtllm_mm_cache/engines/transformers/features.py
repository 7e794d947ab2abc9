"""Embeddings as the language model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout


@dataclass
class _EncoderOutput(BaseModelOutputWithPooling):  # type: ignore[misc]
    """Hugging Face's vision output with the deepstack features that Qwen3-VL's decoder takes."""

    deepstack_features: list[list[torch.Tensor]] | None = None


def encoder_output(layout: FeatureLayout, tensors: Sequence[torch.Tensor]) -> BaseModelOutputWithPooling:
    """Return views of `tensors` as `generate` takes them, in prompt order.

    Hugging Face copies them once, into one tensor; several images for an architecture that wants
    them as one tensor are copied here instead.
    """
    blocks = [torch.split(tensor, layout.hidden, dim=-1) for tensor in tensors]
    features = [block[0] for block in blocks]
    deepstack = [[block[1 + level] for block in blocks] for level in range(layout.levels)]
    if layout.as_tensor:
        joined = features[0] if len(features) == 1 else torch.cat(features)
        return _EncoderOutput(pooler_output=joined)
    return _EncoderOutput(pooler_output=features, deepstack_features=deepstack or None)
