"""What a smaller or larger cache would have hit, from a sample of the keys.

For each capacity factor a miniature cache runs beside the real one: the same policy, the capacity scaled
by the share of the keys that is sampled, and only those keys (Waldspurger, Saemundsson, Ahmad, Park:
"Cache Modeling and Optimization using Miniature Simulations", USENIX ATC 2017). Which keys are sampled
is decided by the key itself, so that all look-ups of a key count or none; the share starts at all keys and
is halved whenever more keys are tracked than allowed (fixed-size SHARDS: Waldspurger, Park, Garthwaite,
Ahmad: "Efficient MRC Construction with SHARDS", USENIX FAST 2015).

What the real cache missed is known of all look-ups, so the sample only has to say by how much another
capacity differs: a sampled look-up that the miniature of factor 1 hits and that of factor 4 too changes
nothing. Whether the few keys that make most of the hits happen to be in the sample then does not matter
(SHARDS corrects for them in another way, which needs no real cache and is less exact).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from trtllm_mm_cache.cache.arena.extents import Extent
from trtllm_mm_cache.cache.entry import Entry
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.scope import Selection

FACTORS = (0.5, 1.0, 2.0, 4.0)

_ACTUAL = FACTORS.index(1.0)

_MOST_KEYS = 16_384
_EPOCHS = 16
_EPOCH_SAMPLES = 1024
_ABOVE_ALL_KEYS = "g"  # keys are hexadecimal


@dataclass(slots=True)
class _Epoch:
    """What happened in one: all `lookups` and real `misses`, and estimates of how many more a factor has."""

    lookups: int = 0
    misses: int = 0
    samples: int = 0
    more_misses: list[int] = field(default_factory=lambda: [0] * len(FACTORS))


@dataclass(frozen=True, slots=True)
class WhatIfPoint:
    """`hit_ratio` (0 to 1): what `factor` times the capacity would have had; with factor 1, what it had."""

    factor: float
    capacity_bytes: int
    hit_ratio: float


@dataclass(frozen=True, slots=True)
class WhatIfCurve:
    """The points, smallest capacity first, over the last `lookups` look-ups; none before the first one.

    `sampling_share` (0 to 1] is the share of the keys that is followed now.
    """

    points: tuple[WhatIfPoint, ...]
    lookups: int
    sampling_share: float


class WhatIf:
    """Follows the look-ups of one cache of `capacity_bytes` under the policy named `policy`. Thread-safe.

    Keys are `EmbeddingKey.hex`: their digits are as good as a hash. At most `most_keys` keys are tracked
    for the largest factor, and about twice as many for all. The curve covers the last 16,384 *sampled*
    look-ups (rounded up by up to an epoch of 1,024), so it covers longer traffic where fewer are sampled.

    Left out, as no part of the cache's size: alignment, holes, and entries that are held when others leave.
    """

    def __init__(self, policy: str, capacity_bytes: int, *, most_keys: int = _MOST_KEYS) -> None:
        self._lock = threading.Lock()
        self._policy = policy
        self._capacity = capacity_bytes
        self._most_keys = most_keys
        self._halvings = 0
        self._below = _ABOVE_ALL_KEYS
        self._caches = self._empty_caches()
        self._epochs = deque([_Epoch()], maxlen=_EPOCHS + 1)
        self._epoch = self._epochs[-1]

    def looked_up(self, key: str, nbytes: int | None) -> None:
        """Count a look-up: `nbytes` is the size of what was found in the real cache, None after a miss.

        Where a smaller cache would have missed what was found, it takes it in now; after a miss all
        caches wait for `loaded`, as the real one does, and look-ups meanwhile are misses too.
        """
        with self._lock:
            epoch = self._epoch
            epoch.lookups += 1
            if nbytes is None:
                epoch.misses += 1
            if key < self._below:
                self._look_up(epoch, key, nbytes)

    def loaded(self, key: str, nbytes: int) -> None:
        """After a miss the embedding came: `nbytes` bytes that the cache would keep if there is room."""
        with self._lock:
            if key >= self._below:
                return
            for cache in self._caches:
                cache.admit(key, nbytes)
            while self._caches[-1].tracked > self._most_keys:
                self._halve()

    def dropped(self, selection: Selection, keys: Iterable[str]) -> None:
        """The real cache was told to drop `selection`, and had `keys` of it.

        What a larger cache alone would still have had of one tag or content is not known; it ages out.
        """
        with self._lock:
            if selection == Selection():
                self._caches = self._empty_caches()
                return
            for key in {*keys, *([selection.key] if selection.key else ())}:
                for cache in self._caches:
                    cache.drop(key)

    def curve(self) -> WhatIfCurve:
        """Return the curve of the last look-ups."""
        with self._lock:
            share = 1 / (1 << self._halvings)
            lookups = sum(epoch.lookups for epoch in self._epochs)
            misses = sum(epoch.misses for epoch in self._epochs)
            more_misses = [sum(counts) for counts in zip(*(e.more_misses for e in self._epochs), strict=True)]
        if not lookups:
            return WhatIfCurve((), 0, share)
        points = []
        for factor, more in zip(FACTORS, more_misses, strict=True):
            # An estimate of a difference can lead out of what is possible, by chance.
            hit_ratio = min(1.0, max(0.0, 1 - (misses + more) / lookups))
            points.append(WhatIfPoint(factor, int(self._capacity * factor), hit_ratio))
        return WhatIfCurve(tuple(points), lookups, share)

    def _look_up(self, epoch: _Epoch, key: str, nbytes: int | None) -> None:
        hits = [cache.look_up(key) for cache in self._caches]
        for index, hit in enumerate(hits):
            if hit is not hits[_ACTUAL]:
                epoch.more_misses[index] += -1 << self._halvings if hit else 1 << self._halvings
            if not hit and nbytes is not None:
                self._caches[index].admit(key, nbytes)
        epoch.samples += 1
        if epoch.samples == _EPOCH_SAMPLES:
            self._epoch = _Epoch()
            self._epochs.append(self._epoch)

    def _empty_caches(self) -> list[MiniatureCache]:
        return [
            MiniatureCache(self._policy, int(self._capacity * factor) >> self._halvings) for factor in FACTORS
        ]

    def _halve(self) -> None:
        """Follow half as many keys from now on, in caches of half the size."""
        self._halvings += 1
        self._below = f"{1 << (64 - self._halvings):016x}"
        for cache in self._caches:
            cache.halve(self._below)


class MiniatureCache:
    """The keys that a cache of `capacity_bytes` under the policy named `policy` would have. Not thread-safe.

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
