"""The what-if curve against caches of those sizes that see every request."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import libcachesim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.traces import REUSE_TRACES, Trace
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.cache.what_if import FACTORS, MiniatureCache, WhatIf

CAPACITY = 4 * 1024**2  # some 450 entries
LENGTH = 24_000
ACTUAL = FACTORS.index(1.0)

Exact = Callable[[int, int], bool]
"""Asks a cache that sees every request for an object of a size; says whether it was a hit."""


def key_of(item: int) -> str:
    return hashlib.sha256(str(item).encode()).hexdigest()


def libcachesim_lru(capacity: int) -> Exact:
    cache, request = libcachesim.LRU(capacity), libcachesim.Request()

    def ask(item: int, size: int) -> bool:
        request.obj_id, request.obj_size = item, size
        return bool(cache.get(request))

    return ask


def own_s3fifo(capacity: int) -> Exact:
    """Our policy in full; `test_oracle` holds it to libCacheSim's."""
    cache = MiniatureCache("s3fifo", capacity)

    def ask(item: int, size: int) -> bool:
        hit = cache.look_up(str(item))
        cache.admit(str(item), size)
        return hit

    return ask


def dictionary_lru(capacity: int) -> Exact:
    """The plainest there is, for sizes of 0 and sizes above the capacity too."""
    sizes: OrderedDict[int, int] = OrderedDict()

    def ask(item: int, size: int) -> bool:
        if item in sizes:
            sizes.move_to_end(item)
            return True
        if size <= capacity:
            while sum(sizes.values()) + size > capacity:
                sizes.popitem(last=False)
            sizes[item] = size
        return False

    return ask


def serve(what_if: WhatIf, real: Exact, trace: Trace) -> list[bool]:
    """Show `what_if` what happens at the real cache, as a PD worker does; return the real hits."""
    hits = []
    for item, size in trace:
        hits.append(real(item, size))
        what_if.looked_up(key_of(item), size if hits[-1] else None)
        if not hits[-1]:
            what_if.loaded(key_of(item), size)
    return hits


def errors(what_if: WhatIf, trace: Trace, make: Callable[[int], Exact], capacity: int) -> list[float]:
    """By how many points the curve is off, over the look-ups that it covers."""
    curve = what_if.curve()
    assert [point.factor for point in curve.points] == list(FACTORS)
    off = []
    for point in curve.points:
        ask = make(int(capacity * point.factor))
        hits = [ask(item, size) for item, size in trace][-curve.lookups :]
        off.append(100 * (point.hit_ratio - sum(hits) / len(hits)))
    print("off by", [round(points, 2) for points in off])
    return off


@pytest.mark.parametrize(
    ("policy", "name"), [*(("lru", name) for name in REUSE_TRACES), ("s3fifo", "scan-polluted")]
)
def test_a_sample_of_the_keys_is_within_two_points_of_the_exact_caches(policy: str, name: str) -> None:
    seed = 5
    print(f"{name} trace, seed {seed}")
    trace = REUSE_TRACES[name](seed, LENGTH)
    make = libcachesim_lru if policy == "lru" else own_s3fifo
    what_if = WhatIf(policy, CAPACITY, most_keys=1000)
    serve(what_if, make(CAPACITY), trace)
    assert what_if.curve().sampling_share <= 0.5, "all keys were followed: no estimate was tested"
    off = errors(what_if, trace, make, CAPACITY)
    assert off[ACTUAL] == pytest.approx(0, abs=1e-9)
    assert max(map(abs, off)) < 2


@given(
    requests=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    sizes=st.lists(st.integers(0, 900), min_size=41, max_size=41),
    capacity=st.integers(200, 4000).map(lambda half: 2 * half),
)
@settings(max_examples=100, deadline=None)
def test_while_every_key_is_followed_the_curve_is_exact(
    requests: list[int], sizes: list[int], capacity: int
) -> None:
    trace = [(item, sizes[item]) for item in requests]
    what_if = WhatIf("lru", capacity)
    serve(what_if, dictionary_lru(capacity), trace)
    assert (what_if.curve().sampling_share, what_if.curve().lookups) == (1, len(trace))
    assert errors(what_if, trace, dictionary_lru, capacity) == pytest.approx([0, 0, 0, 0], abs=1e-9)


def test_before_the_first_look_up_there_is_no_curve() -> None:
    assert WhatIf("lru", 1000).curve().points == ()


def test_old_traffic_is_forgotten() -> None:
    """A day of misses, then a working set that twice the capacity would hold."""
    what_if, real = WhatIf("lru", 1000), dictionary_lru(1000)
    serve(what_if, real, [(number, 100) for number in range(30_000)])
    assert [point.hit_ratio for point in what_if.curve().points] == [0, 0, 0, 0]
    serve(what_if, real, [(number % 15, 100) for number in range(18_000)])
    assert [point.hit_ratio for point in what_if.curve().points] == [0, 0, 1, 1]


def test_a_miss_whose_embedding_never_came_stays_a_miss_everywhere() -> None:
    what_if = WhatIf("lru", 1000)
    for _ in range(4):
        what_if.looked_up(key_of(1), None)
    assert [point.hit_ratio for point in what_if.curve().points] == [0, 0, 0, 0]
    what_if.loaded(key_of(1), 700)
    for _ in range(4):
        what_if.looked_up(key_of(1), 700)
    assert [point.hit_ratio for point in what_if.curve().points] == [0, 0.5, 0.5, 0.5]


def test_what_is_dropped_is_dropped_from_every_size() -> None:
    what_if, real = WhatIf("lru", 1000), dictionary_lru(1000)
    serve(what_if, real, [(1, 100), (2, 100)])
    what_if.dropped(Selection(key=key_of(1)), ())
    what_if.looked_up(key_of(1), None)
    what_if.looked_up(key_of(2), 100)
    assert [point.hit_ratio for point in what_if.curve().points] == [0.25] * 4
    what_if.dropped(Selection(), [key_of(2)])
    what_if.looked_up(key_of(2), None)
    assert [point.hit_ratio for point in what_if.curve().points] == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_memory_is_bounded_whatever_the_sizes(policy: str) -> None:
    """Huge entries, then tiny ones of which all would fit: ghosts of evicted entries count too."""
    what_if = WhatIf(policy, 10_000_000, most_keys=300)
    sizes = [*[1_000_000] * 200, *[64] * 6000]
    for number, size in enumerate(sizes):
        what_if.looked_up(key_of(number), None)
        what_if.loaded(key_of(number), size)
        assert all(cache.tracked <= 300 for cache in what_if._caches)
    assert what_if.curve().sampling_share < 0.2


def test_threads_may_use_it_at_the_same_time() -> None:
    what_if = WhatIf("lru", 10_000, most_keys=100)

    def use(first: int) -> None:
        serve(what_if, lambda item, size: False, [(first + number % 300, 100) for number in range(2000)])

    threads: Sequence[threading.Thread] = [threading.Thread(target=use, args=(n * 1000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert all(0 <= point.hit_ratio <= 1 for point in what_if.curve().points)
    assert what_if.curve().lookups == 8000
