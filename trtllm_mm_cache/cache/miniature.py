"""A cache without bytes: which keys one of a given size and policy would hold."""

from __future__ import annotations

from trtllm_mm_cache.cache.arena.extents import Extent
from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.eviction.base import make_policy


class MiniatureCache:
    """The books of a cache of `capacity_bytes` under the eviction policy named `policy`. Not thread-safe.

    The policies are those of the real cache. Nothing is ever held here, and nothing is lost to
    alignment or holes.
    """

    def __init__(self, policy: str, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._policy = make_policy(policy, capacity_bytes)
        self._entries: dict[str, Entry] = {}
        self._nbytes = 0

    @property
    def tracked(self) -> int:
        """Keys that are remembered, those of evicted entries included where the policy keeps them."""
        return sum(queue.entries for queue in self._policy.queues())

    def look_up(self, key: str) -> bool:
        """Whether `key` is in; a hit is a use of it."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._policy.touch(entry)
        return True

    def admit(self, key: str, nbytes: int) -> None:
        """Put an entry in, evicting others; nothing happens when it is in, or larger than the cache."""
        if key in self._entries or nbytes > self._capacity:
            return
        self._make_room(nbytes)
        entry = Entry(key, Extent(0, nbytes), "what-if")
        self._entries[key] = entry
        self._policy.admit(entry)
        self._nbytes += nbytes

    def drop(self, key: str) -> None:
        """Take an entry out that the real cache was told to drop."""
        entry = self._entries.get(key)
        if entry is not None:
            self._remove(entry, evicted=False)

    def halve(self, below: str) -> None:
        """Go on with half the capacity and without the entries whose keys do not sort before `below`."""
        for entry in [entry for entry in self._policy.entries() if entry.key >= below]:
            self._remove(entry, evicted=False)
        self._capacity //= 2
        self._policy.resize(self._capacity)
        self._make_room(0)

    def _make_room(self, nbytes: int) -> None:
        while self._nbytes + nbytes > self._capacity and (victim := self._policy.victim()):
            self._remove(victim, evicted=True)

    def _remove(self, entry: Entry, *, evicted: bool) -> None:
        del self._entries[entry.key]
        self._policy.forget(entry, evicted=evicted)
        self._nbytes -= entry.extent.nbytes
