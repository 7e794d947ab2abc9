"""What the cache's operations cost beyond the copy, with 1,000 and with 100,000 entries.

    python -m benchmarks.cache_operations [--rounds 40]

Entries of 2 KiB, so that the copy costs next to nothing, in full caches. In each round every operation runs
100 times on every cache, the caches in turn; each call is timed. Medians in microseconds:

    get             a hit: a tensor that pins its entry; with its going out of use
    lease           a hit: a lease on it; with its release
    set             a new entry: one is evicted, the tensor copied
    reserve+commit  a new entry in place: one is evicted; with the release of the lease

Beside them, as the floor of what a cache costs that pins nothing and has no arena: an `OrderedDict` of
ordinary tensors, `get` with `move_to_end`, `set` with `clone` and `popitem`; `view` is what torch takes to
make a tensor over given memory, without which no cache hands out views.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.measuring import finish, median_us, say
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

NBYTES = 2048
ENTRY = CachedEmbedding(torch.zeros(2, NBYTES // 4, dtype=torch.float16), [[1, 2, 2]])
METADATA = EmbeddingMetadata(grid_thw=(1, 2, 2))
COUNTS = (1_000, 100_000)
CALLS = 100


class Subject(Protocol):
    """A full cache: its keys, new names for it, and its operations by name."""

    operations: dict[str, Callable[[str], object]]
    adds: frozenset[str]

    def keys(self) -> list[str]:
        """Return the keys of now."""
        ...


class Ours:
    """A manager under one of the policies."""

    adds = frozenset({"set", "reserve+commit"})

    def __init__(self, policy: str, entries: int) -> None:
        capacity = entries * NBYTES
        self.manager = MultimodalEmbeddingCacheManager(capacity, policy=make_policy(policy, capacity))
        for number in range(entries):
            self.manager.set(f"{number:064x}", ENTRY)
        self.keys = self.manager.keys
        self.operations = {
            "get": self.manager.get,
            "lease": self._lease,
            "set": lambda key: self.manager.set(key, ENTRY),
            "reserve+commit": self._reserve_and_commit,
        }

    def _lease(self, key: str) -> None:
        lease = self.manager.lease(key)
        if lease is None:
            raise SystemExit("a key that was there is gone")
        lease.release()

    def _reserve_and_commit(self, key: str) -> None:
        reservation = self.manager.reserve(key, NBYTES, owner="benchmark")
        reservation.commit(dtype=torch.float16, shape=(2, NBYTES // 4), metadata=METADATA).release()


class Floor:
    """Ordinary tensors in an `OrderedDict`."""

    adds = frozenset({"set"})

    def __init__(self, entries: int) -> None:
        self._tensors = OrderedDict((f"{number:064x}", ENTRY.tensor.clone()) for number in range(entries))
        self._memory = memoryview(bytearray(NBYTES))
        self.operations = {"get": self._get, "set": self._set, "view": self._view}

    def keys(self) -> list[str]:
        """Return the keys, least recently used first."""
        return list(self._tensors)

    def _get(self, key: str) -> torch.Tensor:
        self._tensors.move_to_end(key)
        return self._tensors[key]

    def _view(self, key: str) -> torch.Tensor:
        return torch.frombuffer(self._memory[:NBYTES], dtype=torch.float16).view(2, -1)

    def _set(self, key: str) -> None:
        self._tensors.popitem(last=False)
        self._tensors[key] = ENTRY.tensor.clone()


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Run all operations on all caches in turn."""
    subjects: dict[str, Subject] = {}
    for entries in COUNTS:
        subjects[f"lru {entries}"] = Ours("lru", entries)
        subjects[f"s3fifo {entries}"] = Ours("s3fifo", entries)
        subjects[f"OrderedDict {entries}"] = Floor(entries)
    gc.freeze()  # a collection over 100,000 entries of three caches in one process is no part of a call
    source, serial = random.Random(1), itertools.count(10**9)
    spent: dict[str, dict[str, list[float]]] = {
        name: {operation: [] for operation in subject.operations} for name, subject in subjects.items()
    }
    for number in range(rounds):
        for name, subject in subjects.items():
            present = source.sample(subject.keys()[-500:], CALLS)
            for operation, call in subject.operations.items():
                keys = (
                    [f"{next(serial):064x}" for _ in range(CALLS)] if operation in subject.adds else present
                )
                seconds = time_calls(call, keys)
                if number:
                    spent[name][operation] += seconds
        if number % 10 == 0:
            say(f"round {number} of {rounds}")
    return {
        name: {operation: median_us(seconds) for operation, seconds in operations.items()}
        for name, operations in spent.items()
    }


def time_calls(call: Callable[[str], object], keys: list[str]) -> list[float]:
    """Return the seconds of each call, with the end of what it returns."""
    spent = []
    for key in keys:
        began = time.perf_counter()
        call(key)
        spent.append(time.perf_counter() - began)
    return spent


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="rounds of 100 calls")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    clock = statistics.median(time_calls(lambda key: None, ["key"] * 10_000))
    medians = measure(rounds)
    for name, row in medians.items():
        say(f"{name:>20}: {row}")
    few, many = (medians[f"lru {entries}"] for entries in COUNTS)
    results: dict[str, Any] = {
        "rounds": rounds,
        "entry_bytes": NBYTES,
        "clock_us": round(clock * 1e6, 2),
        "median_us": medians,
        "lru_100000_to_1000": {operation: round(many[operation] / few[operation], 2) for operation in few},
    }
    finish("cache_operations", results)


if __name__ == "__main__":
    main()
