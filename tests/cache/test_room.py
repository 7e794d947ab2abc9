"""Room: what is evicted is what an LRU cache without holes would evict, and holes appear by moving."""

from __future__ import annotations

import random
import zlib
from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch

from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ArenaFullError

UNIT = 256 * 1024
CAPACITY = 16 * UNIT


def _mark(key: str) -> int:
    return zlib.crc32(key.encode()) % 251


def _fill(manager: MultimodalEmbeddingCacheManager, key: str, units: int) -> Lease:
    reservation = manager.reserve(key, units * UNIT, owner="test")
    reservation.view.fill_(_mark(key))
    return reservation.commit(dtype=torch.uint8, shape=(units * UNIT,))


def _is_intact(lease: Lease) -> bool:
    return bool(lease.tensor.eq(_mark(lease.key)).all())


@pytest.fixture
def manager() -> MultimodalEmbeddingCacheManager:
    return MultimodalEmbeddingCacheManager(CAPACITY)


def test_a_real_cache_has_exactly_its_capacity(manager: MultimodalEmbeddingCacheManager) -> None:
    assert manager.arena.capacity_bytes == CAPACITY


def test_entries_move_aside_when_only_a_hole_is_missing(manager: MultimodalEmbeddingCacheManager) -> None:
    for number in range(16):
        _fill(manager, str(number), 1).release()
    for number in (3, 8, 13):
        manager.drop(str(number))
    assert manager.statistics().arena.fragmentation > 0.6
    _fill(manager, "new", 3).release()
    snapshot = manager.statistics()
    assert snapshot.evictions == 0
    assert snapshot.entries == 14
    assert 1 <= snapshot.moves <= 2
    assert snapshot.moved_bytes == snapshot.moves * UNIT
    for key in manager.keys():
        with manager.lease(key) or pytest.fail(key) as lease:
            assert _is_intact(lease), key


def test_what_is_held_does_not_move(manager: MultimodalEmbeddingCacheManager) -> None:
    leases = {number: _fill(manager, str(number), 1) for number in range(16)}
    tensors = {number: lease.tensor for number, lease in leases.items() if number % 2}
    addresses = {number: lease.address for number, lease in leases.items()}
    for number in range(0, 16, 2):
        leases[number].release()
    with pytest.raises(ArenaFullError):
        manager.reserve("new", 2 * UNIT, owner="test")
    assert len(manager.keys()) == 16, "where no run is long enough nothing is evicted in vain"
    manager.drop("7")
    with pytest.raises(ArenaFullError):
        manager.reserve("new", 2 * UNIT, owner="test")
    leases[7].release()
    del tensors[7]
    _fill(manager, "new", 3).release()
    assert all(leases[number].address == addresses[number] for number in tensors)
    assert all(_is_intact(leases[number]) for number in tensors)


def test_excess_eviction_is_bounded_when_moving_is_impossible() -> None:
    """Two equal halves between entries that stay: whatever is asked for, at most one half goes."""
    manager = MultimodalEmbeddingCacheManager(CAPACITY)
    order = ["fix 0", *"abcdefg", "fix 1", *"hijklmn"]
    leases = {key: _fill(manager, key, 1) for key in order}
    for key in "abcdefghijklmn":
        leases[key].release()
    for key in "hbjdlfn":  # the least recently used ones alternate between the halves
        with manager.lease(key) or pytest.fail(key):
            pass
    _fill(manager, "new", 4).release()
    assert manager.statistics().evicted_bytes <= 8 * UNIT


def _zipf_trace(seed: int, *, objects: int, length: int) -> tuple[list[int], list[int]]:
    print(f"trace seed {seed}")
    source = random.Random(seed)
    sizes = [round(2 ** source.uniform(12, 20)) for _ in range(objects)]
    weights = [1 / (rank + 1) ** 0.8 for rank in range(objects)]
    return sizes, source.choices(range(objects), weights, k=length)


def _lru_without_holes(capacity: int, sizes: list[int], trace: list[int]) -> Iterator[bool]:
    entries: OrderedDict[int, int] = OrderedDict()
    used = 0
    for item in trace:
        yield item in entries
        if item in entries:
            entries.move_to_end(item)
            continue
        while used + sizes[item] > capacity:
            used -= entries.popitem(last=False)[1]
        entries[item] = sizes[item]
        used += sizes[item]


def test_fragmentation_costs_less_than_half_a_point_of_hit_ratio() -> None:
    """Sizes from 4 KiB to 1 MiB in 64 MiB: the spread of dynamic-resolution models, scaled down."""
    capacity = 64 * 1024**2
    sizes, trace = _zipf_trace(7, objects=3000, length=12_000)
    manager = MultimodalEmbeddingCacheManager(capacity)
    payload = torch.zeros(1024**2, dtype=torch.uint8)
    warm = len(trace) // 4
    hits = utilization = needed = 0.0
    for number, item in enumerate(trace):
        if manager.get(str(item)) is None:
            manager.set(str(item), CachedEmbedding(payload[: sizes[item]]))
            needed += sizes[item] if number >= warm else 0
        else:
            hits += number >= warm
        if number == warm:
            before = manager.statistics().evicted_bytes
        utilization += manager.stats["utilization"] if number >= warm else 0
    ideal = sum(list(_lru_without_holes(capacity, sizes, trace))[warm:])
    counted = len(trace) - warm
    assert abs(ideal - hits) / counted <= 0.005
    assert utilization / counted >= 0.95
    evicted = manager.statistics().evicted_bytes - before
    assert evicted <= 1.25 * needed
    assert manager.statistics().moves > 0


def test_uniform_sizes_give_the_hit_sequence_of_an_lru_without_holes() -> None:
    _, trace = _zipf_trace(11, objects=100, length=3000)
    manager = MultimodalEmbeddingCacheManager(20 * 100_000)
    entry = CachedEmbedding(torch.zeros(100_000, dtype=torch.uint8))
    # 100,000 is no multiple of 64: alignment costs one of the twenty
    hits = []
    for item in trace:
        hits.append(manager.get(str(item)) is not None)
        if not hits[-1]:
            manager.set(str(item), entry)
    assert hits == list(_lru_without_holes(19 * 100_000, [100_000] * 100, trace))
    assert manager.statistics().moves == 0


def _at_once(manager: MultimodalEmbeddingCacheManager, key: str, units: int) -> bool:
    reservation = manager.reserve_at_once(key, units * UNIT, owner="test")
    if reservation is None:
        return False
    reservation.commit(dtype=torch.uint8, shape=(units * UNIT,)).release()
    return True


def test_room_at_once_evicts_as_ever_and_moves_nothing(manager: MultimodalEmbeddingCacheManager) -> None:
    assert all(_at_once(manager, str(number), 1) for number in range(16))
    assert _at_once(manager, "new", 1)
    assert manager.keys() == [*(str(number) for number in range(1, 16)), "new"]
    for number in (3, 8, 13):
        manager.drop(str(number))
    assert not _at_once(manager, "large", 3)
    assert (manager.statistics().moves, manager.statistics().reservations) == (0, 0)
    _fill(manager, "large", 3).release()
    assert manager.statistics().moves > 0


def test_room_at_once_evicts_no_more_than_a_few() -> None:
    manager = MultimodalEmbeddingCacheManager(64 * UNIT)
    for number in range(64):
        _fill(manager, str(number), 1).release()
    assert not _at_once(manager, "large", 48)
    assert manager.statistics().evictions == 32
    _fill(manager, "large", 48).release()
    assert manager.statistics().evictions == 48


def test_room_at_once_is_refused_where_everything_is_held(manager: MultimodalEmbeddingCacheManager) -> None:
    held = [_fill(manager, str(number), 1) for number in range(16)]
    with pytest.raises(ArenaFullError):
        manager.reserve_at_once("new", UNIT, owner="test")
    assert len(held) == manager.statistics().entries
