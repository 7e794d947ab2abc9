"""Between GPU and arena: the bytes are right, and each goes by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.cuda.conftest import MB
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.transformers.features import joined_on


def copies(work: Any) -> list[str]:
    """Run `work` and return the kinds of the copies between host and device, as CUDA names them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if "Memcpy" in event.name]
    return [name for name in names if "HtoD" in name or "DtoH" in name]


@pytest.mark.parametrize("megabytes", [1, 34])
def test_a_towers_output_goes_into_its_extent_by_one_pinned_copy(
    manager: MultimodalEmbeddingCacheManager, megabytes: int
) -> None:
    tensor = torch.rand(megabytes * MB // 4, device="cuda")
    reservation = manager.reserve("a", tensor.nbytes, owner="test")
    torch.cuda.synchronize()
    seen = copies(lambda: reservation.write(tensor, computed=True))
    assert len(seen) == 1
    assert "Pinned" in seen[0]
    with reservation.commit(dtype=tensor.dtype, shape=(1, tensor.numel())) as lease:
        assert torch.equal(lease.tensor.flatten(), tensor.cpu())


def test_what_is_still_being_computed_is_waited_for(manager: MultimodalEmbeddingCacheManager) -> None:
    for round_trip in range(20):
        matrix = torch.rand(2048, 2048, device="cuda")
        result = (matrix @ matrix @ matrix).sum(dim=1, keepdim=True).expand(-1, 64).contiguous()
        key = str(round_trip)
        assert manager.set(key, CachedEmbedding(result))
        found = manager.get(key)
        assert found is not None
        assert torch.equal(found.tensor, result.cpu())


def test_a_copy_into_the_arena_does_not_wait_for_the_next_batch(
    manager: MultimodalEmbeddingCacheManager,
) -> None:
    tensor = torch.rand(MB, device="cuda")
    reservation = manager.reserve("a", tensor.nbytes, owner="test")
    torch.cuda.synchronize()
    next_batch = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second of the stream that towers compute on
    next_batch.record()
    reservation.write(tensor, computed=True)
    assert not next_batch.query()
    torch.cuda.synchronize()
    reservation.abandon()


@pytest.mark.parametrize("count", [1, 10])
def test_a_hit_is_one_pinned_copy_an_image(manager: MultimodalEmbeddingCacheManager, count: int) -> None:
    tensors = [torch.rand(100 + index, 512) for index in range(count)]
    leases = [stored(manager, str(index), tensor) for index, tensor in enumerate(tensors)]
    views = [lease.tensor for lease in leases]
    parts: list[Sequence[torch.Tensor]] = []
    seen = copies(lambda: parts.append(joined_on(torch.device("cuda"), views)))
    assert len(seen) == count
    assert all("Pinned" in name for name in seen)
    assert all(torch.equal(part.cpu(), tensor) for part, tensor in zip(parts[0], tensors, strict=True))


def stored(manager: MultimodalEmbeddingCacheManager, key: str, tensor: torch.Tensor) -> Any:
    reservation = manager.reserve(key, tensor.nbytes, owner="test")
    reservation.write(tensor)
    return reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape))
