"""What the language model is given of several images: on another device, one copy for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.transformers.features import encoder_output, joined_on


class Operators(TorchDispatchMode):
    """Notes the name of each operator that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def images(count: int) -> list[torch.Tensor]:
    return [torch.rand(3 + index, 8) for index in range(count)]


@pytest.mark.parametrize("count", [1, 4])
def test_each_image_is_copied_once_into_its_place(count: int) -> None:
    tensors = images(count)
    with Operators() as operators:
        parts = joined_on(torch.device("cpu"), tensors)
    assert operators.names.count("copy_") == count
    assert not {"cat", "clone", "_to_copy", "contiguous"} & set(operators.names)
    assert [torch.equal(part, tensor) for part, tensor in zip(parts, tensors, strict=True)] == [True] * count
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


@pytest.mark.parametrize("as_tensor", [True, False])
def test_on_the_cpu_one_image_is_not_copied_at_all(as_tensor: bool) -> None:
    (tensor,) = images(1)
    with Operators() as operators:
        encoder_output(FeatureLayout(8, 0, torch.float32, as_tensor), [tensor], torch.device("cpu"))
    assert not {"copy_", "cat", "clone", "_to_copy"} & set(operators.names)
