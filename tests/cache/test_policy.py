"""Eviction policies at the manager's face: who leaves first, who is passed over, what is remembered."""

from __future__ import annotations

import pytest
import torch

from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ConfigurationError

UNIT = 64 * 1024
UNITS = 20  # two of them are S3-FIFO's small queue


def cache(policy: str, units: int = UNITS) -> MultimodalEmbeddingCacheManager:
    capacity = units * UNIT
    return MultimodalEmbeddingCacheManager(capacity, policy=make_policy(policy, capacity))


def put(manager: MultimodalEmbeddingCacheManager, key: str, nbytes: int = UNIT) -> list[str]:
    """Store an entry; return the evicted keys."""
    mutation = manager.set_with_delta(key, CachedEmbedding(torch.zeros(nbytes, dtype=torch.uint8)))
    assert mutation.stored
    return mutation.removed_keys


def queues(manager: MultimodalEmbeddingCacheManager) -> dict[str, tuple[int, int]]:
    return {queue.name: (queue.entries, queue.nbytes) for queue in manager.statistics().queues}


def use(manager: MultimodalEmbeddingCacheManager, *keys: str) -> None:
    for key in keys:
        assert manager.get(key) is not None


@pytest.fixture
def full() -> MultimodalEmbeddingCacheManager:
    """S3-FIFO, filled: small has "s0" and "s1", main has "m0" to "m17"."""
    manager = cache("s3fifo")
    for key in ["s0", "s1", *(f"m{number}" for number in range(18))]:
        assert put(manager, key) == []
    assert queues(manager) == {"small": (2, 2 * UNIT), "main": (18, 18 * UNIT), "ghost": (0, 0)}
    return manager


def test_names_select_and_an_unknown_one_is_refused() -> None:
    assert cache("lru").statistics().policy == "lru"
    assert MultimodalEmbeddingCacheManager(UNIT).statistics().policy == "lru"
    with pytest.raises(ConfigurationError, match="'fifo'"):
        make_policy("fifo", UNIT)


def test_lru_evicts_in_the_order_of_keys() -> None:
    manager = cache("lru", units=4)
    for key in "abcd":
        put(manager, key)
    use(manager, "a", "c")
    assert manager.keys() == ["b", "d", "a", "c"]
    assert put(manager, "e", 3 * UNIT) == ["b", "d", "a"]
    assert queues(manager) == {"lru": (2, 4 * UNIT)}


def test_s3fifo_keeps_main_from_a_scan(full: MultimodalEmbeddingCacheManager) -> None:
    evicted = [key for number in range(100) for key in put(full, f"scan {number}")]
    assert evicted == ["s0", "s1"] + [f"scan {number}" for number in range(98)]
    assert all(full.peek(f"m{number}") for number in range(18))


def test_s3fifo_promotes_what_was_used_twice_in_small(full: MultimodalEmbeddingCacheManager) -> None:
    use(full, "s0", "s0", "s1")
    assert put(full, "new") == ["s1"], "one use is not enough"
    assert queues(full)["main"] == (19, 19 * UNIT)
    assert put(full, "newer") == ["m0"], "main is over its share now, and its oldest was never used"
    assert full.keys()[:2] == ["new", "newer"]


def test_s3fifo_lets_main_go_round_for_what_was_used(full: MultimodalEmbeddingCacheManager) -> None:
    use(full, "s0", "s0", "m0", "m1", "m1")
    assert put(full, "new") == ["s1"]
    assert put(full, "newer") == ["m2"]
    assert full.keys()[-2:] == ["m0", "m1"], "used since their last turn: at the end again"


def test_s3fifo_remembers_what_left_small_and_takes_it_into_main(
    full: MultimodalEmbeddingCacheManager,
) -> None:
    put(full, "new")
    assert queues(full)["ghost"] == (1, UNIT)
    assert put(full, "s0") == ["s1"]
    assert queues(full) == {"small": (1, UNIT), "main": (19, 19 * UNIT), "ghost": (1, UNIT)}
    assert full.keys()[0] == "new"
    assert full.keys()[-1] == "s0"


def test_s3fifo_forgets_the_oldest_ghosts(full: MultimodalEmbeddingCacheManager) -> None:
    for number in range(100):
        put(full, f"scan {number}")
    assert queues(full)["ghost"] == (18, 18 * UNIT), "nine tenths of the capacity"
    put(full, "scan 0")
    assert full.keys()[1] == "scan 0", "forgotten: it starts in small as anybody else"


def test_ghosts_of_tiny_entries_are_few() -> None:
    manager = cache("s3fifo", units=2)
    for number in range(3 * 2 * UNIT // 64):
        put(manager, str(number), 64)
    ghosts, counted = queues(manager)["ghost"]
    assert 0 < ghosts <= 2 * UNIT * 9 // 10 // 1024
    assert counted == 1024 * ghosts


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_what_is_held_is_passed_over(policy: str) -> None:
    manager = cache(policy)
    for number in range(UNITS):
        put(manager, str(number))
    held = {str(number): manager.lease(str(number)) for number in range(0, UNITS, 2)}
    for number in range(60):
        assert not held.keys() & set(put(manager, f"new {number}"))
    assert all(manager.peek(key) for key in held)
    for lease in held.values():
        assert lease is not None
        lease.release()
    for number in range(200):  # enough for their uses to be spent
        put(manager, f"newer {number}")
        use(manager, f"newer {number}", f"newer {number}")
    assert not any(manager.peek(key) for key in held)


def test_s3fifo_finds_the_one_idle_entry_wherever_it_is(full: MultimodalEmbeddingCacheManager) -> None:
    for idle in ("s1", "m9", "m17"):
        keys = full.keys()
        leases = [full.lease(key) for key in keys if key != idle]
        assert put(full, f"instead of {idle}") == [idle]
        del leases


def test_s3fifo_caches_what_is_larger_than_its_small_queue(full: MultimodalEmbeddingCacheManager) -> None:
    put(full, "large", 15 * UNIT)
    assert full.peek("large")
    put(full, "everything", UNITS * UNIT)
    assert full.keys() == ["everything"]


def test_s3fifo_dropped_keys_leave_no_ghost(full: MultimodalEmbeddingCacheManager) -> None:
    full.drop("s0")
    assert queues(full)["ghost"] == (0, 0)
    full.clear()
    assert queues(full) == {"small": (0, 0), "main": (0, 0), "ghost": (0, 0)}
