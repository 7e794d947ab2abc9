"""What Dynamo's cache of the same name does, told in the plainest way: the oracle of a differential test."""

from __future__ import annotations

from typing import Any


class DynamoModel:
    """Keys and sizes, oldest first. No bytes, no holders: no one keeps a tensor."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity = capacity_bytes
        self.sizes: list[tuple[str, int]] = []
        self.hits = self.misses = self.evictions = 0

    def used(self) -> int:
        return sum(size for _, size in self.sizes)

    def has(self, key: str) -> bool:
        return any(name == key for name, _ in self.sizes)

    def get(self, key: str) -> bool:
        if not self.has(key):
            self.misses += 1
            return False
        self.hits += 1
        entry = next(pair for pair in self.sizes if pair[0] == key)
        self.sizes.remove(entry)
        self.sizes.append(entry)
        return True

    def make_room_for(self, key: str, size: int) -> tuple[bool, list[str]]:
        if size > self.capacity:
            return False, []
        self.sizes = [pair for pair in self.sizes if pair[0] != key]
        removed = []
        while self.used() + size > self.capacity and self.sizes:
            removed.append(self.sizes.pop(0)[0])
        self.evictions += len(removed)
        return True, removed

    def set_with_delta(self, key: str, size: int) -> tuple[bool, list[str], list[str]]:
        present = self.has(key)
        admitted, removed = self.make_room_for(key, size)
        if not admitted:
            return False, [], []
        self.sizes.append((key, size))
        return True, [] if present else [key], removed

    def keys(self) -> list[str]:
        return [key for key, _ in self.sizes]

    def stats(self) -> dict[str, Any]:
        lookups = self.hits + self.misses
        return {
            "entries": len(self.sizes),
            "current_bytes": self.used(),
            "capacity_bytes": self.capacity,
            "utilization": self.used() / self.capacity if self.capacity else 0,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
            "hit_rate": self.hits / lookups if lookups else 0.0,
        }
