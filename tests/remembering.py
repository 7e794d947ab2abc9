"""Knowing which cache managers a test makes, however deep inside the product it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager


def remember_managers(
    patch: pytest.MonkeyPatch, remember: Callable[[MultimodalEmbeddingCacheManager], object]
) -> None:
    """Have every manager that is made until `patch` ends told to `remember`."""
    construct = MultimodalEmbeddingCacheManager.__init__

    def construct_and_remember(self: MultimodalEmbeddingCacheManager, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        remember(self)

    patch.setattr(MultimodalEmbeddingCacheManager, "__init__", construct_and_remember)
