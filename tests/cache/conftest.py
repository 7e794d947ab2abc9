"""Every manager made in a cache test is checked and closed after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager


@pytest.fixture(autouse=True)
def checked_managers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MultimodalEmbeddingCacheManager]]:
    made: list[MultimodalEmbeddingCacheManager] = []
    construct = MultimodalEmbeddingCacheManager.__init__

    def construct_and_remember(self: MultimodalEmbeddingCacheManager, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(MultimodalEmbeddingCacheManager, "__init__", construct_and_remember)
    yield made
    for manager in made:
        manager.check_integrity()
        manager.close()
        manager.check_integrity()
