"""Eviction policies: in which order entries leave when room is needed. One file a policy.

The ledger tells its policy what becomes visible, is used and leaves, and asks it for the next victim. A
policy sees sizes, uses and whether an entry has holders; it never touches bytes, extents or holders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.eviction.lru import LruPolicy
from trtllm_mm_cache.cache.eviction.s3fifo import S3FifoPolicy
from trtllm_mm_cache.cache.statistics import QueueStatistics
from trtllm_mm_cache.errors import ConfigurationError


class EvictionPolicy(Protocol):
    """Order among the visible entries of one cache. Called under its lock; O(1) if not said otherwise.

    Between `admit` and `forget` an entry belongs to exactly one of its queues.
    """

    @property
    def name(self) -> str:
        """The name that selects it."""
        ...

    def admit(self, entry: Entry) -> None:
        """`entry` became visible."""
        ...

    def touch(self, entry: Entry) -> None:
        """A look-up found `entry`."""
        ...

    def forget(self, entry: Entry, *, evicted: bool) -> None:
        """`entry` leaves: `evicted` to make room, else dropped or replaced."""
        ...

    def victim(self) -> Entry | None:
        """Return the entry that should leave next, or None when every one has holders.

        Entries with holders are passed over. Amortised O(1) beside the held entries it passes. May reorder
        its queues; the entry stays in them until `forget`.
        """
        ...

    def resize(self, capacity_bytes: int) -> None:
        """Go on as the policy of a cache of that size; the caller evicts what no longer fits."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Iterate over all entries, those that would leave first, were none used any more, in front. O(n)."""
        ...

    def queues(self) -> tuple[QueueStatistics, ...]:
        """Describe its queues, remembered keys of evicted entries ("ghosts") included."""
        ...

    def check_integrity(self, visible: Mapping[str, Entry]) -> None:
        """Raise `IntegrityError` unless the queues hold `visible` and nothing else, and agree. O(n)."""
        ...


def make_policy(name: str, capacity_bytes: int) -> EvictionPolicy:
    """Return a new policy for a cache of `capacity_bytes`. Raises `ConfigurationError` for unknown names."""
    if name == "lru":
        return LruPolicy()
    if name == "s3fifo":
        return S3FifoPolicy(capacity_bytes)
    raise ConfigurationError(f"there is no eviction policy '{name}'; choose lru or s3fifo")
