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


def encoder_output(
    layout: FeatureLayout, tensors: Sequence[torch.Tensor], device: torch.device | None = None
) -> BaseModelOutputWithPooling:
    """Return `tensors` as `generate` takes them, in prompt order.

    On the CPU they are views, and Hugging Face copies them once, into one tensor; several images for an
    architecture that wants them as one tensor are copied here instead. To a GPU each goes by one copy
    into its place in one tensor there; the leases can be released when this returns.
    """
    if device is not None and device.type != "cpu":
        tensors = joined_on(device, tensors)
    blocks = [torch.split(tensor, layout.hidden, dim=-1) for tensor in tensors]
    features = [block[0] for block in blocks]
    deepstack = [[block[1 + level] for block in blocks] for level in range(layout.levels)]
    if layout.as_tensor:
        joined = features[0] if len(features) == 1 else torch.cat(features)
        return _EncoderOutput(pooler_output=joined)
    return _EncoderOutput(pooler_output=features, deepstack_features=deepstack or None)


def joined_on(device: torch.device, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copy `[rows, width]` tensors beside each other into one on `device`, and return each one's part of it.

    The copies are queued together, asynchronous where the host memory is page-locked, and have ended when
    this returns.
    """
    rows = [tensor.shape[0] for tensor in tensors]
    joined = torch.empty((sum(rows), *tensors[0].shape[1:]), dtype=tensors[0].dtype, device=device)
    parts = torch.split(joined, rows)
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor, non_blocking=True)
    if joined.is_cuda:
        torch.cuda.current_stream(device).synchronize()
    return parts
