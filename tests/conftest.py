"""For every test: torch has one thread, and afterwards every cache's accounting is consistent."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

import pytest
import torch

from tests.remembering import remember_managers
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small models: more threads only wait for each other. And logits are compared to the last bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def live_managers() -> Iterator[weakref.WeakSet[MultimodalEmbeddingCacheManager]]:
    """The managers of this process that are still alive, fixtures' own included."""
    managers: weakref.WeakSet[MultimodalEmbeddingCacheManager] = weakref.WeakSet()
    with pytest.MonkeyPatch.context() as patch:
        remember_managers(patch, managers.add)
        yield managers


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What the product sets for its own process and children is no other test's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        if name.startswith(("DYN_", "MM_CACHE_")):
            del os.environ[name]


@pytest.fixture(autouse=True)
def integrity(live_managers: weakref.WeakSet[MultimodalEmbeddingCacheManager]) -> Iterator[None]:
    yield
    for manager in list(live_managers):
        manager.check_integrity()
