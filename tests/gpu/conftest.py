"""What needs a CUDA device, tensorrt_llm and real models; skipped where one of them is missing.

`TRTLLM_MM_CACHE_MODELS` names a folder that holds model directories by their hub's base names, for
example `Qwen3-VL-2B-Instruct`. docs/tensorrt-llm.md has the commands.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.halves import GpuHalves

MODELS = ("llava-v1.6-mistral-7b-hf", "Qwen2.5-VL-3B-Instruct", "Qwen3-VL-2B-Instruct")
"""The models of upstream's own E/PD test that fit one GPU twice."""

FOLDER = os.environ.get("TRTLLM_MM_CACHE_MODELS", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = None
    if not torch.cuda.is_available():
        missing = "no CUDA device"
    elif importlib.util.find_spec("tensorrt_llm") is None:
        missing = "tensorrt_llm is not installed"
    elif not FOLDER:
        missing = "TRTLLM_MM_CACHE_MODELS is not set"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(1800))
            if missing is not None:
                item.add_marker(pytest.mark.skip(reason=missing))


def model_dir_of(name: str) -> Path:
    folder = Path(FOLDER) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in TRTLLM_MM_CACHE_MODELS")
    return folder


@pytest.fixture(scope="module", params=MODELS)
def halves(request: pytest.FixtureRequest) -> Iterator[GpuHalves]:
    """Encoder and generator of one model on one GPU, with batches of one as in upstream's test."""
    loaded = GpuHalves.load(model_dir_of(request.param))
    yield loaded
    loaded.close()
