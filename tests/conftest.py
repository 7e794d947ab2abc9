"""After every test the books of every cache in this process must agree, whatever the test was about."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest

from tests.remembering import remember_managers
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager


@pytest.fixture(scope="session", autouse=True)
def live_managers() -> Iterator[weakref.WeakSet[MultimodalEmbeddingCacheManager]]:
    """The managers of this process that are still alive, fixtures' own included."""
    managers: weakref.WeakSet[MultimodalEmbeddingCacheManager] = weakref.WeakSet()
    with pytest.MonkeyPatch.context() as patch:
        remember_managers(patch, managers.add)
        yield managers


@pytest.fixture(autouse=True)
def integrity(live_managers: weakref.WeakSet[MultimodalEmbeddingCacheManager]) -> Iterator[None]:
    yield
    for manager in list(live_managers):
        manager.check_integrity()
