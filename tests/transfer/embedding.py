"""Embeddings whose bytes follow from their key, so that either process can make them."""

from __future__ import annotations

import numpy as np
import torch


def embedding(key: str, nbytes: int) -> torch.Tensor:
    """Return `[nbytes]` random uint8, the same in every process."""
    generator = np.random.Generator(np.random.SFC64([len(key), *key.encode()]))
    return torch.from_numpy(generator.integers(0, 256, nbytes, dtype=np.uint8))
