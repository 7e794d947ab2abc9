"""Random weights under which the logits depend clearly on every input."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

_TABLES = ("embed_tokens", "position_embed", "pos_embed", "class_embedding", "cls_token", "newline")
"""Parameters that are looked up or added, not multiplied."""


def fill_weights(model: nn.Module, seed: int) -> None:
    """Overwrite all parameters in place; each has its own generator, seeded by `seed` and its name.

    Hugging Face initialises for training: standard deviation 0.02, some projections at zero (the
    whole multimodal projector of Gemma 3). At these widths that makes logits nearly equal for every
    image, and a comparison of logits nearly empty. Here each matrix preserves the variance of what
    it multiplies, norms are near one, and nothing is zero.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if any(part in name for part in _TABLES):
        return 0.5 * noise
    if noise.dim() <= 1:
        multiplies = name.endswith(".weight") or "lambda" in name
        return float(multiplies) + 0.05 * noise
    fan_in = noise.shape[0] if name.endswith("projection_weight") else noise[0].numel()
    # Queries and keys of this length make attention prefer few positions: with all weights alike it is
    # close to a mean over everything, which hides a wrong position.
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return gain * noise / math.sqrt(fan_in)
