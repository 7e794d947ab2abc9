"""Stress: threads that do everything to one cache at once, for as long as wanted.

    python -m tests.cache.stress --seconds 600

Whatever is written is one number, repeated, that no other writing has; it is also in the entry's grid.
So every view tells which writing it must show, however long it is kept and whatever happened to its key.
Prints what was done and how the process's own memory went, as one JSON object; `make soak` runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import ArenaFullError

CAPACITY = 16 * 1024 * 1024
KEYS = 120  # about twice as many as fit
KEPT = 6
ALLOWED_GROWTH_MB = 16.0
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Report:
    """What a run did. Memory is the process's own (RssAnon: without the arena), in MB of 1024**2 bytes."""

    policy: str
    seconds: float
    threads: int
    seed: int
    operations: dict[str, int]
    views_compared: int
    evictions: int
    moves: int
    memory_mb_early: float
    memory_mb_late: float

    @property
    def growth_mb(self) -> float:
        """How much more memory the last quarter of the run had than the second, by their medians."""
        return self.memory_mb_late - self.memory_mb_early


class Worker:
    """One thread's part: draws operations until the deadline, keeps some views, compares all it keeps."""

    def __init__(
        self, manager: MultimodalEmbeddingCacheManager, seed: int, serials: itertools.count[int]
    ) -> None:
        self._manager = manager
        self._source = random.Random(seed)
        self._serials = serials
        self._kept: list[tuple[torch.Tensor, int]] = []
        self._leases: list[Lease] = []
        self.operations: Counter[str] = Counter()
        self.compared = 0
        weights: dict[Callable[[str], str], int] = {
            self.get: 3,
            self.lease: 2,
            self.set: 2,
            self.commit: 2,
            self.abandon: 1,
            self.quarantine: 1,
            self.drop: 1,
            self.make_room: 1,
        }
        self._actions = [action for action, weight in weights.items() for _ in range(weight)]

    def run(self, deadline: float) -> None:
        """Work until `deadline` on the monotonic clock, then release everything."""
        while time.monotonic() < deadline:
            key = str(min(self._source.randrange(KEYS), self._source.randrange(KEYS)))
            self.operations[self._source.choice(self._actions)(key)] += 1
            for tensor, serial in self._kept:
                self.compare(tensor, serial)
            while len(self._kept) > self._source.randrange(KEPT + 1):
                self._kept.pop(self._source.randrange(len(self._kept)))
            while len(self._leases) > KEPT:
                self._leases.pop(self._source.randrange(KEPT)).release()
        self._kept.clear()
        self._leases.clear()  # dropped, not released: that must do as well

    def compare(self, tensor: torch.Tensor, serial: int) -> None:
        if not tensor.eq(serial).all():
            raise AssertionError(f"a view of writing {serial} shows other bytes")
        self.compared += 1

    def keep(self, tensor: torch.Tensor, serial: int) -> None:
        if self._source.random() < 0.5:
            tensor = tensor[:, 1::3]
        self._kept.append((tensor, serial))

    def content(self) -> tuple[torch.Tensor, int]:
        serial = next(self._serials)
        rows = round(2 ** self._source.uniform(6, 14))  # 4 KiB to 1 MiB
        return torch.full((rows, 8), serial, dtype=torch.int64), serial

    def get(self, key: str) -> str:
        embedding = self._manager.get(key)
        if embedding is None:
            return "get: miss"
        assert embedding.image_grid_thw is not None
        self.keep(embedding.tensor, embedding.image_grid_thw[0][0])
        return "get: hit"

    def lease(self, key: str) -> str:
        lease = self._manager.lease(key)
        if lease is None:
            return "lease: miss"
        tensor, grid = lease.tensor, lease.metadata.grid_thw
        self.keep(tensor, grid[0] if grid else int(tensor[0, 0]))
        self._leases.append(lease.clone() if self._source.random() < 0.3 else lease)
        return "lease: hit"

    def set(self, key: str) -> str:
        tensor, serial = self.content()
        stored, added, _ = self._manager.set_with_delta(key, CachedEmbedding(tensor, [[serial, 1, 1]]))
        return "set: stored" if added else "set: replaced" if stored else "set: no room"

    def commit(self, key: str) -> str:
        tensor, serial = self.content()
        try:
            reservation = self._manager.reserve(key, tensor.nbytes, owner="stress")
        except ArenaFullError:
            return "commit: no room"
        reservation.write(tensor)
        metadata = EmbeddingMetadata(grid_thw=(serial, 1, 1))
        lease = reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape), metadata=metadata)
        self.keep(lease.tensor, serial)
        return "commit"

    def abandon(self, key: str) -> str:
        try:
            reservation = self._manager.reserve(key, self._source.randrange(1, 1 << 20), owner="stress")
        except ArenaFullError:
            return "abandon: no room"
        reservation.view.fill_(255)
        reservation.abandon()
        return "abandon"

    def quarantine(self, key: str) -> str:
        """A write that arrives late: after the quarantine, before it is settled."""
        try:
            reservation = self._manager.reserve(key, self._source.randrange(1, 1 << 20), owner="stress")
        except ArenaFullError:
            return "quarantine: no room"
        view = reservation.view
        reservation.quarantine()
        view.fill_(254)
        reservation.settle()
        return "quarantine"

    def drop(self, key: str) -> str:
        return "drop" if self._manager.drop(key) else "drop: absent"

    def make_room(self, key: str) -> str:
        admitted, _ = self._manager.make_room_for(key, self._source.randrange(1 << 20))
        return "make room" if admitted else "make room: not admitted"


def run_stress(policy: str, *, seconds: float, threads: int, seed: int) -> Report:
    """Stress a new cache under `policy`, checking its accounting all the while.

    Raises what a thread raised, `IntegrityError`, and `AssertionError` for anything left over at the end.
    """
    manager = MultimodalEmbeddingCacheManager(CAPACITY, policy=make_policy(policy, CAPACITY))
    serials = itertools.count(1)
    workers = [Worker(manager, seed + number, serials) for number in range(threads)]
    deadline = time.monotonic() + seconds
    memory: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(worker.run, deadline) for worker in workers]
        while time.monotonic() < deadline and not any(future.done() for future in futures):
            manager.check_integrity()
            memory.append(own_memory_mb())
            threading.Event().wait(_PAUSE_S)
        for future in futures:
            future.result()
    snapshot = manager.statistics()
    assert snapshot.leased_entries == snapshot.withdrawn_entries == snapshot.reservations == 0, snapshot
    assert snapshot.quarantined == snapshot.forgotten == 0, snapshot
    manager.clear()
    manager.check_integrity()
    assert manager.statistics().arena.free_bytes == manager.arena.capacity_bytes
    manager.close()
    quarter = len(memory) // 4
    return Report(
        policy=policy,
        seconds=seconds,
        threads=threads,
        seed=seed,
        operations=dict(sorted(sum((worker.operations for worker in workers), Counter()).items())),
        views_compared=sum(worker.compared for worker in workers),
        evictions=snapshot.evictions,
        moves=snapshot.moves,
        memory_mb_early=round(statistics.median(memory[quarter : 2 * quarter + 1]), 2),
        memory_mb_late=round(statistics.median(memory[-quarter - 1 :]), 2),
    )


def own_memory_mb() -> float:
    """Return the process's anonymous memory: what it holds beside the arena and mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the kernel does not report RssAnon")


def main() -> None:
    parser = argparse.ArgumentParser(description="Stress one cache with threads; see the file.")
    parser.add_argument("--seconds", type=float, default=600, help="for each policy")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    # The cache warns of each entry it has no room for, which is half of what the threads provoke.
    logging.getLogger("trtllm_mm_cache.cache").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    print(f"seed {arguments.seed}", file=sys.stderr, flush=True)
    for policy in ("lru", "s3fifo"):
        report = run_stress(policy, seconds=arguments.seconds, threads=arguments.threads, seed=arguments.seed)
        print(json.dumps({**vars(report), "growth_mb": round(report.growth_mb, 2)}), flush=True)
        if report.growth_mb > ALLOWED_GROWTH_MB:
            raise SystemExit(f"the process grew by {report.growth_mb:.1f} MB")


if __name__ == "__main__":
    main()
