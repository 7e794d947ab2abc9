from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.encode.bench import Bench, running
from tests.media.conftest import traced
from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

__all__ = ["traced"]


@pytest.fixture(scope="package")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TransformersVisionEncoder:
    model: Path = make_tiny_model("llava", tmp_path_factory.mktemp("model") / "llava")
    return TransformersVisionEncoder(model, TransformersEngineArgs(device="cpu", torch_threads=1))


@pytest.fixture
async def bench(encoder: TransformersVisionEncoder) -> AsyncIterator[Bench]:
    async with running(encoder) as started:
        yield started
