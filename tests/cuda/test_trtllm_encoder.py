"""The TensorRT-LLM adapter opens another process's GPU memory, and its bytes reach the arena.

The engine is its peer (`tests/trtllm_peer`), whose tower computes on the GPU and exports CUDA IPC handles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.contract import picture
from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.engines.trtllm import TrtllmEncoderArgs, TrtllmVisionEncoder

PEER = Path(__file__).resolve().parents[1] / "trtllm_peer"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_tiny_model("qwen3_vl", tmp_path / "qwen3_vl")


@pytest.fixture
def encoder(model_dir: Path) -> Iterator[TrtllmVisionEncoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEER))
        patch.setenv("TRTLLM_PEER_DEVICE", "cuda")
        loaded = TrtllmVisionEncoder(model_dir, TrtllmEncoderArgs())
        yield loaded
        loaded.close()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def test_cuda_handles_of_another_process_are_stored_right(
    encoder: TrtllmVisionEncoder, model_dir: Path, manager: MultimodalEmbeddingCacheManager
) -> None:
    reference = TransformersVisionEncoder(model_dir, TransformersEngineArgs(device="cuda"))
    for seed in range(20):
        image = picture(seed, 120, 80)
        (item,) = encoder.encode([encoder.preprocess(EncodeItem(image))])
        assert isinstance(item, EncodedItem), item
        assert item.tensor.is_cuda
        reservation = manager.reserve(str(seed), item.tensor.nbytes, owner="test")
        reservation.write(item.tensor, computed=True)
        dtype, shape = item.tensor.dtype, tuple(item.tensor.shape)
        del item  # upon which the other process can free it
        (expected,) = reference.encode([reference.preprocess(EncodeItem(image))])
        assert isinstance(expected, EncodedItem), expected
        with reservation.commit(dtype=dtype, shape=shape) as lease:
            assert torch.equal(lease.tensor, expected.tensor.cpu())
    reference.close()
