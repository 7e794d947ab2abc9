"""The drop-in face: call for call what the class of that name in Dynamo does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cache.dynamo_model import DynamoModel
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

KEYS = st.sampled_from("abcdefghij")


def _floats(count: int, value: float = 0.0) -> CachedEmbedding:
    return CachedEmbedding(torch.full((count,), float(value)))


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, list[tuple[str, str, int]]]:
    """A capacity and calls with sizes in bytes that often fit exactly, often not, sometimes never."""
    capacity = draw(st.sampled_from([0, 1, 300, 1000, 4096, 100_000]))
    sizes = st.one_of(
        st.integers(0, max(capacity // 2, 1)),
        st.integers(0, capacity + 2),
        st.sampled_from([capacity, capacity // 3, capacity + 1]),
    )
    call = st.tuples(st.sampled_from(["get", "get", "set", "set", "delta", "room"]), KEYS, sizes)
    return capacity, draw(st.lists(call, max_size=60))


@given(programs())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_calls_give_the_same_results(program: tuple[int, list[tuple[str, str, int]]]) -> None:
    capacity, calls = program
    manager, model = MultimodalEmbeddingCacheManager(capacity), DynamoModel(capacity)
    written: dict[str, torch.Tensor] = {}
    for number, (name, key, size) in enumerate(calls):
        tensor = torch.full((size,), number % 251, dtype=torch.uint8)
        if name == "get":
            entry = manager.get(key)
            assert (entry is not None) == model.get(key)
            assert entry is None or entry.tensor.equal(written[key])
            del entry
        elif name == "room":
            assert manager.make_room_for(key, size) == model.make_room_for(key, size)
        else:
            expected = model.set_with_delta(key, size)
            if name == "set":
                assert manager.set(key, CachedEmbedding(tensor)) == expected[0]
            else:
                assert manager.set_with_delta(key, CachedEmbedding(tensor)) == expected
            if expected[0]:
                written[key] = tensor
        assert manager.keys() == model.keys()
        assert manager.stats == model.stats()
        manager.check_integrity()
    manager.close()


def test_a_few_hundred_bytes_hold_what_their_sizes_say() -> None:
    manager = MultimodalEmbeddingCacheManager(capacity_bytes=300)
    for key in "abc":
        assert manager.set(key, _floats(25, ord(key)))
    assert manager.stats["utilization"] == 1.0
    assert manager.get("a") is not None
    assert manager.set_with_delta("d", _floats(25)) == (True, ["d"], ["b"])
    assert manager.keys() == ["c", "a", "d"]
    assert not manager.set("e", _floats(76))
    assert manager.set_with_delta("a", _floats(50)) == (True, [], ["c"])
    assert manager.stats["evictions"] == 2


def test_what_was_set_is_a_copy_with_all_its_fields() -> None:
    manager = MultimodalEmbeddingCacheManager(4096)
    source = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    manager.set("a", CachedEmbedding(source, [[1, 2, 3]], [[4, 5, 6]], 0.5, [0.0, 1.0]))
    source.fill_(0)
    entry = manager.get("a")
    assert entry is not None
    tensor, image_grid_thw, video_grid_thw, second_per_grid_ts, video_timestamps = entry
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (image_grid_thw, video_grid_thw) == ([[1, 2, 3]], [[4, 5, 6]])
    assert (second_per_grid_ts, video_timestamps) == (0.5, [0.0, 1.0])
    assert entry.image_grid_thw is image_grid_thw


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.tensor([True, False, True]),
        torch.arange(6, dtype=torch.int64).reshape(1, 2, 3),
        torch.full((3, 5), 1.5, dtype=torch.bfloat16),
        torch.full((3, 5), 1.5).to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j, 3 - 4j]),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.zeros(0, 7),
        torch.ones(4, requires_grad=True),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_every_dtype_and_shape_comes_back(tensor: torch.Tensor) -> None:
    manager = MultimodalEmbeddingCacheManager(4096)
    assert manager.set("other", _floats(3))
    assert manager.set("a", CachedEmbedding(tensor))
    entry = manager.get("a")
    assert entry is not None
    assert entry.tensor.dtype == tensor.dtype
    assert entry.tensor.shape == tensor.shape
    assert not entry.tensor.requires_grad
    plain = tensor.detach().resolve_conj().reshape(-1)
    assert entry.tensor.reshape(-1).view(torch.uint8).equal(plain.view(torch.uint8))
    assert manager.stats["current_bytes"] == 12 + tensor.element_size() * tensor.numel()


def test_a_tensor_that_is_not_contiguous_is_refused_as_in_dynamo() -> None:
    manager = MultimodalEmbeddingCacheManager(4096)
    with pytest.raises(AssertionError, match="Tensor must be contiguous"):
        manager.set("a", CachedEmbedding(torch.zeros(4, 4).T))
    assert manager.stats["entries"] == 0


def test_a_replaced_tensor_that_is_still_held_leaves_its_bytes_to_its_holder() -> None:
    manager = MultimodalEmbeddingCacheManager(400)
    manager.set("a", _floats(50, 1.0))
    held = manager.get("a")
    assert held is not None
    assert manager.set_with_delta("a", _floats(50, 2.0)) == (True, [], [])
    assert not manager.set("a", _floats(60, 3.0)), "the held one and this one are more than the capacity"
    assert manager.keys() == ["a"], "a refused set changes nothing"
    current = manager.get("a")
    assert current is not None
    assert current.tensor.eq(2.0).all()
    assert held.tensor.eq(1.0).all()
    assert manager.stats["evictions"] == 0


def test_room_that_held_entries_do_not_leave_is_not_admitted_and_nothing_changes() -> None:
    manager = MultimodalEmbeddingCacheManager(400)
    manager.set("held", _floats(50))
    manager.set("idle", _floats(50))
    held = manager.get("held")
    assert manager.make_room_for("new", 300) == (False, [])
    assert manager.make_room_for("held", 300) == (False, [])
    assert manager.keys() == ["idle", "held"]
    assert manager.make_room_for("new", 200) == (True, ["idle"])
    del held
    assert manager.make_room_for("new", 300) == (True, ["held"])
