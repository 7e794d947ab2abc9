"""Many threads on one small cache: every view shows what was written under its key, nothing leaks."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ArenaFullError

THREADS = 4
STEPS = 400
SEED = 20261


@contextmanager
def _frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _payload(key: int, nbytes: int) -> torch.Tensor:
    """Eight bytes that name the key, repeated: any mixture of two writers shows."""
    return torch.full((nbytes // 8,), key, dtype=torch.int64)


def _work(manager: MultimodalEmbeddingCacheManager, seed: int, barrier: threading.Barrier) -> int:
    source = random.Random(seed)
    kept: list[tuple[int, torch.Tensor]] = []
    seen = 0
    barrier.wait(timeout=10)
    for _ in range(STEPS):
        key = source.randrange(30)
        match source.randrange(6):
            case 0:
                manager.set(str(key), CachedEmbedding(_payload(key, source.choice([8000, 40_960, 200_000]))))
            case 1 | 2:
                if (written := _write_in_place(manager, source, key)) is not None:
                    kept.append((key, written))
                del written
            case 3:
                if (entry := manager.get(str(key))) is not None:
                    kept.append((key, entry.tensor[1:]))
            case 4:
                with manager.lease(str(key)) or manager.lease("absent") or _nothing() as lease:
                    if lease is not None:
                        with lease.clone() as clone:
                            assert clone.tensor.eq(key).all()
                        seen += 1
            case _:
                manager.drop(str(key))
        for owner, tensor in kept:
            assert tensor.eq(owner).all(), "a view that was handed out changed"
        del kept[: max(0, len(kept) - 3)]
    return seen


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _write_in_place(
    manager: MultimodalEmbeddingCacheManager, source: random.Random, key: int
) -> torch.Tensor | None:
    nbytes = source.choice([8000, 81_920, 300_000])
    try:
        reservation = manager.reserve(str(key), nbytes, owner="thread")
    except ArenaFullError:
        return None
    reservation.view.view(torch.int64).fill_(key)
    end = source.randrange(4)
    if end == 0:
        reservation.abandon()
        return None
    if end == 1:
        reservation.quarantine()
        reservation.settle()
        return None
    # Half of the leases are released, half are dropped.
    lease = reservation.commit(dtype=torch.int64, shape=(nbytes // 8,))
    tensor = lease.tensor
    if end == 2:
        lease.release()
    return tensor


@pytest.mark.parametrize("transfer", [False, True])
def test_threads(transfer: bool) -> None:
    capacity = 1024 * 1024  # no slack in the region: holes run short and entries move
    manager = (
        MultimodalEmbeddingCacheManager(0, transfer_bytes=capacity)
        if transfer
        else MultimodalEmbeddingCacheManager(capacity)
    )
    barrier = threading.Barrier(THREADS + 1)
    print(f"seeds {SEED} to {SEED + THREADS - 1}")
    with _frequent_switches(), ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(_work, manager, SEED + number, barrier) for number in range(THREADS)]
        barrier.wait(timeout=10)
        while not all(future.done() for future in futures):
            manager.check_integrity()
            manager.statistics()
        seen = sum(future.result() for future in futures)
    assert seen > 0
    snapshot = manager.statistics()
    assert snapshot.leased_entries == snapshot.withdrawn_entries == snapshot.reservations == 0
    assert snapshot.quarantined == snapshot.forgotten == 0
    assert transfer or snapshot.moves > 0
    manager.clear()
    assert manager.statistics().arena.free_bytes == manager.arena.capacity_bytes
