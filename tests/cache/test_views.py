"""A tensor that left the cache stays valid as long as any alias of it lives, however the alias was made."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ArenaFullError, IntegrityError

CAPACITY = 64 * 1024


def _inference_view(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor[1:].unsqueeze(0).transpose(1, 2)


def _other_tensor_on_the_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (3,), (1,))


def _in_a_cycle(tensor: torch.Tensor) -> list[Any]:
    box: list[Any] = [tensor[0]]
    box.append(box)
    return box


ALIASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda t: t,
    "slice": lambda t: t[1:, 2:],
    "view of another dtype": lambda t: t.view(torch.uint8),
    "transposed": lambda t: t.T,
    "detached": lambda t: t.detach(),
    "data": lambda t: t.data,
    "requires grad": lambda t: t.requires_grad_(),
    "row of unbind": lambda t: t.unbind()[0],
    "view under inference mode": _inference_view,
    "numpy": lambda t: t.numpy(),
    "numpy of a view": lambda t: t[1:].view(torch.uint8).numpy()[:, 3:],
    "memoryview of numpy": lambda t: memoryview(t.numpy()),
    "DLPack capsule": torch.utils.dlpack.to_dlpack,
    "numpy through DLPack": np.from_dlpack,
    "storage": lambda t: t.untyped_storage(),
    "another tensor on the storage": _other_tensor_on_the_storage,
    "list of views": list,
    "cycle": _in_a_cycle,
}


def _full(value: float) -> CachedEmbedding:
    return CachedEmbedding(torch.full((8, CAPACITY // 32), value))


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("through", ["get", "lease"])
def test_an_alias_pins_the_bytes_and_its_end_frees_them(name: str, through: str) -> None:
    manager = MultimodalEmbeddingCacheManager(CAPACITY)
    assert manager.set("a", _full(1.0))
    if through == "get":
        entry = manager.get("a")
        assert entry is not None
        tensor = entry.tensor
        del entry
    else:
        lease = manager.lease("a")
        assert lease is not None
        tensor = lease.tensor
        lease.release()
    alias = ALIASES[name](tensor)
    del tensor
    assert not manager.set("b", _full(2.0)), "the bytes are in use, there is no room"
    assert manager.keys() == ["a"]
    with pytest.raises(ArenaFullError):
        manager.reserve("b", CAPACITY, owner="test")
    manager.drop("a")
    assert not manager.set("b", _full(2.0)), "dropped, but still in use"
    assert manager.statistics().withdrawn_bytes == CAPACITY

    del alias
    if name == "cycle":  # all others go by reference counts alone
        assert not manager.set("b", _full(2.0))
        gc.collect()
    assert manager.set("b", _full(2.0))
    assert manager.statistics().withdrawn_entries == 0


def test_values_stay_valid_whatever_is_evicted_or_replaced() -> None:
    manager = MultimodalEmbeddingCacheManager(16 * 1024)
    tensors = []
    for round_ in range(3):
        manager.set("kept", CachedEmbedding(torch.full((1024,), float(round_))))
        entry = manager.get("kept")
        assert entry is not None
        tensors.append(entry.tensor)
        for other in range(8):
            manager.set(f"other {other}", CachedEmbedding(torch.full((512,), -1.0)))
        manager.check_integrity()
    for round_, tensor in enumerate(tensors):
        assert tensor.eq(float(round_)).all()


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode_makes_no_difference(inside: bool) -> None:
    with torch.inference_mode(inside):
        manager = MultimodalEmbeddingCacheManager(4096)
        manager.set("a", CachedEmbedding(torch.arange(4.0)))
        entry = manager.get("a")
    assert entry is not None
    manager.set("b", CachedEmbedding(torch.arange(4.0)))
    reservation = manager.reserve("c", 16, owner="test")
    reservation.view.fill_(1)
    reservation.commit(dtype=torch.uint8, shape=(16,)).release()
    assert entry.tensor.tolist() == [0, 1, 2, 3]


def test_a_copy_and_a_pickle_carry_the_entry_alone() -> None:
    manager = MultimodalEmbeddingCacheManager(4 * 1024 * 1024)
    manager.set("a", CachedEmbedding(torch.arange(64.0)))
    entry = manager.get("a")
    assert entry is not None
    assert len(pickle.dumps(entry.tensor)) < 4096
    copied = copy.deepcopy(entry.tensor)
    del entry
    assert manager.statistics().leased_entries == 0
    assert copied.equal(torch.arange(64.0))


def test_a_tensor_outlives_the_manager() -> None:
    manager = MultimodalEmbeddingCacheManager(4096)
    manager.set("a", CachedEmbedding(torch.arange(8.0)))
    entry = manager.get("a")
    assert entry is not None
    manager.close()
    with pytest.raises(IntegrityError, match="closed"):
        manager.get("a")
    assert entry.tensor.equal(torch.arange(8.0))
