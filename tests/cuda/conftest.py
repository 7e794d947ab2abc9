"""What needs a CUDA device, NIXL and transformers, and nothing else: no engine, no network, no dynamo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager

MB = 1024**2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def manager() -> Iterator[MultimodalEmbeddingCacheManager]:
    """A page-locked cache."""
    cache = MultimodalEmbeddingCacheManager(256 * MB)
    cache.arena.page_lock()
    assert cache.arena.page_locked
    yield cache
    cache.check_integrity()
    cache.close()


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each kind of layout."""
    return make_tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)
