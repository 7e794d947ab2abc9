"""S3-FIFO by bytes: what is seen once leaves soon, so that a scan does not push out what is used again.

Yang, Zhang, Qiu, Yue, Vigfusson: "FIFO queues are all you need for cache eviction" (SOSP 2023). Three
first-in-first-out queues, and a count of uses, at most 3, for each entry:

    new ──▶ small ──used twice or more──▶ main ──used since its last turn──▶ back to main's end
              │                             └──not used──▶ evicted
              └──else evicted, its key to ghost;  a key found in ghost starts in main

The paper counts objects; embeddings differ in size by two orders of magnitude, so queues are measured in
bytes, as libCacheSim's implementation measures them: a tenth of the capacity for small, the rest for
main, keys of evicted entries worth nine tenths of the capacity in ghost. As there, what comes while nothing
was evicted yet starts in main once small is full: a first filling cannot tell a scan from what is popular,
and a main queue that fills by promotions alone leaves most of the cache to small. Two things differ:

- Entries larger than the small queue are cached (there they are refused): they pass through small alone.
- Entries in use are passed over; they go to the end of their queue, since a use now is no older than those.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.statistics import QueueStatistics
from trtllm_mm_cache.errors import IntegrityError

_MOST_USES = 3
_USES_FOR_MAIN = 2
# A ghost costs some 300 bytes of memory whatever its entry's size was; counted as at least this much, all
# of them together stay below a third of the capacity even where entries are tiny.
_LEAST_GHOST_BYTES = 1024


class _Queue:
    """Entries with their counts of uses, first in first out, and the sum of their bytes."""

    __slots__ = ("nbytes", "uses")

    def __init__(self) -> None:
        self.uses: OrderedDict[Entry, int] = OrderedDict()
        self.nbytes = 0

    def append(self, entry: Entry) -> None:
        self.uses[entry] = 0
        self.nbytes += entry.extent.nbytes

    def remove(self, entry: Entry) -> None:
        del self.uses[entry]
        self.nbytes -= entry.extent.nbytes

    def check_integrity(self) -> None:
        if self.nbytes != sum(entry.extent.nbytes for entry in self.uses):
            raise IntegrityError("inconsistent accounting of the cache: bytes in an S3-FIFO queue")
        if not all(0 <= uses <= _MOST_USES for uses in self.uses.values()):
            raise IntegrityError("inconsistent accounting of the cache: uses in an S3-FIFO queue")


class S3FifoPolicy:
    """For a cache of `capacity_bytes`. See `base.EvictionPolicy`."""

    name = "s3fifo"

    def __init__(self, capacity_bytes: int) -> None:
        self._small = _Queue()
        self._main = _Queue()
        self._ghosts: OrderedDict[str, int] = OrderedDict()  # key to the bytes it counts for
        self._ghost_bytes = 0
        self._filling = True
        self.resize(capacity_bytes)

    def resize(self, capacity_bytes: int) -> None:
        """Set the queues' limits; ghosts beyond theirs are forgotten."""
        self._small_limit = capacity_bytes // 10
        self._main_limit = capacity_bytes - self._small_limit
        self._ghost_limit = capacity_bytes * 9 // 10
        self._forget_ghosts()

    def admit(self, entry: Entry) -> None:
        """File in main when the key was evicted from small not long ago, else in small."""
        nbytes = self._ghosts.pop(entry.key, None)
        if nbytes is not None:
            self._ghost_bytes -= nbytes
            self._main.append(entry)
        elif self._filling and self._small.nbytes >= self._small_limit:
            self._main.append(entry)
        else:
            self._small.append(entry)

    def touch(self, entry: Entry) -> None:
        """Count a use; nothing moves."""
        uses = self._small.uses if entry in self._small.uses else self._main.uses
        if uses[entry] < _MOST_USES:
            uses[entry] += 1

    def forget(self, entry: Entry, *, evicted: bool) -> None:
        """Take it out; the key of what was evicted from small is remembered."""
        if entry in self._main.uses:
            self._main.remove(entry)
            return
        self._small.remove(entry)
        if evicted:
            self._remember(entry)

    def victim(self) -> Entry | None:
        """Return the oldest idle entry of small that was not used twice, or of main that was not used."""
        self._filling = False
        if self._main.nbytes > self._main_limit and (entry := self._victim_in_main()):
            return entry
        # Small may promote all it has, which leaves main to choose from.
        return self._victim_in_small() or self._victim_in_main()

    def entries(self) -> Iterator[Entry]:
        """Iterate over small, then main, each oldest first."""
        yield from self._small.uses
        yield from self._main.uses

    def queues(self) -> tuple[QueueStatistics, ...]:
        """Describe small and main, and the ghosts with the bytes they count for."""
        return (
            QueueStatistics("small", len(self._small.uses), self._small.nbytes),
            QueueStatistics("main", len(self._main.uses), self._main.nbytes),
            QueueStatistics("ghost", len(self._ghosts), self._ghost_bytes),
        )

    def check_integrity(self, visible: Mapping[str, Entry]) -> None:
        """Raise `IntegrityError` unless small and main share out `visible`, and ghosts are others and few."""
        small, main = self._small.uses.keys(), self._main.uses.keys()
        if small & main or small | main != set(visible.values()):
            raise IntegrityError("inconsistent accounting of the cache: S3-FIFO queues and look-ups differ")
        self._small.check_integrity()
        self._main.check_integrity()
        if self._ghosts.keys() & visible.keys():
            raise IntegrityError("inconsistent accounting of the cache: a visible entry has a ghost")
        if not sum(self._ghosts.values()) == self._ghost_bytes <= self._ghost_limit:
            raise IntegrityError("inconsistent accounting of the cache: bytes of the ghosts")

    def _victim_in_small(self) -> Entry | None:
        queue = self._small.uses
        for _ in range(len(queue)):
            entry = next(iter(queue))
            if queue[entry] >= _USES_FOR_MAIN:
                self._small.remove(entry)
                self._main.append(entry)
            elif entry.holders:
                queue.move_to_end(entry)
            else:
                return entry
        return None

    def _victim_in_main(self) -> Entry | None:
        queue = self._main.uses
        for _ in range((_MOST_USES + 1) * len(queue)):
            entry = next(iter(queue))
            uses = queue[entry]
            if not uses and not entry.holders:
                return entry
            if uses:
                queue[entry] = uses - 1
            queue.move_to_end(entry)
        return None

    def _remember(self, entry: Entry) -> None:
        nbytes = max(entry.extent.nbytes, _LEAST_GHOST_BYTES)
        self._ghosts[entry.key] = nbytes
        self._ghost_bytes += nbytes
        self._forget_ghosts()

    def _forget_ghosts(self) -> None:
        while self._ghost_bytes > self._ghost_limit:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]
