"""NaN and infinity in embeddings: found wherever they stand, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch
import xxhash

from trtllm_mm_cache.transfer.finite import checksum_and_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTH = 200_003  # several pieces and an odd end, in every dtype


def verdict(tensor: torch.Tensor) -> bool:
    nbytes = tensor.numel() * tensor.element_size()
    return checksum_and_finite(tensor.data_ptr(), nbytes, str(tensor.dtype).removeprefix("torch."))[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_non_finite_value_is_found_at_every_kind_of_place(dtype: torch.dtype) -> None:
    values = torch.zeros(LENGTH, dtype=dtype)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in (0, 1, LENGTH // 2, 65535, 65536, LENGTH - 1):
            values[place] = value
            assert not verdict(values), (value, place)
            values[place] = 0
    assert verdict(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_values_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0, 1.0]
    assert verdict(torch.tensor(extremes, dtype=dtype))


def test_types_without_such_values_hold_none() -> None:
    assert verdict(torch.full((16,), 255, dtype=torch.uint8))
    assert verdict(torch.full((16,), -1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", ["float32", "uint8", None])
@pytest.mark.parametrize("nbytes", [0, 1, 512 * 1024, 512 * 1024 + 12, 3_000_004])
def test_the_checksum_is_that_of_the_whole(nbytes: int, dtype: str | None) -> None:
    data = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, _ = checksum_and_finite(data.data_ptr(), nbytes, dtype)
    assert found == xxhash.xxh3_64_intdigest(data.numpy())
