"""Request traces: who is asked for, and how large it is. The same seed gives the same trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

Trace = list[tuple[int, int]]
"""Object numbers and their sizes in bytes, in the order of the requests."""


def _size(source: random.Random) -> int:
    """From 1 to 32 KiB, log-uniform: the spread of dynamic-resolution models, some 300 times smaller."""
    return round(2 ** source.uniform(10, 15)) // 64 * 64


def _sized(source: random.Random, objects: Iterator[int], length: int) -> Trace:
    sizes: dict[int, int] = {}
    return [
        (item, sizes[item] if item in sizes else sizes.setdefault(item, _size(source)))
        for item in itertools.islice(objects, length)
    ]


def _ranks(source: random.Random, count: int, alpha: float) -> Iterator[int]:
    weights = [1 / (rank + 1) ** alpha for rank in range(count)]
    cumulated = list(itertools.accumulate(weights))
    while True:
        yield source.choices(range(count), cum_weights=cumulated)[0]


def zipf(seed: int, length: int) -> Trace:
    """The same items are popular all the time."""
    source = random.Random(seed)
    return _sized(source, _ranks(source, 4000, 0.9), length)


def scan_polluted(seed: int, length: int) -> Trace:
    """As `zipf`, but every 500 requests a client goes through 300 items that are never asked for again."""
    source = random.Random(seed)

    def objects() -> Iterator[int]:
        once = itertools.count(1_000_000)
        popular = _ranks(source, 4000, 0.9)
        while True:
            yield from itertools.islice(popular, 500)
            yield from itertools.islice(once, 300)

    return _sized(source, objects(), length)


def shifting(seed: int, length: int) -> Trace:
    """What is popular changes: the ranks move on by one object every 10 requests."""
    source = random.Random(seed)
    objects = ((rank + number // 10) % 4000 for number, rank in enumerate(_ranks(source, 4000, 0.9)))
    return _sized(source, objects, length)


def uniform(seed: int, length: int) -> Trace:
    """Every item is as likely as every other."""
    source = random.Random(seed)
    return _sized(source, (source.randrange(4000) for _ in itertools.count()), length)


def conversations(seed: int, length: int) -> Trace:
    """200 chats at a time, each of 8 turns, each turn with the last 5 of the chat's 12 items."""
    source = random.Random(seed)

    def objects() -> Iterator[int]:
        numbers = itertools.count(step=12)
        chats = [(next(numbers), turn % 8) for turn in range(200)]
        while True:
            place = source.randrange(len(chats))
            first, turn = chats[place]
            yield from range(first + turn, first + turn + 5)
            chats[place] = (first, turn + 1) if turn < 7 else (next(numbers), 0)

    return _sized(source, objects(), length)


TRACES: dict[str, Callable[[int, int], Trace]] = {
    "zipf": zipf,
    "scan-polluted": scan_polluted,
    "shifting": shifting,
}

REUSE_TRACES = {**TRACES, "uniform": uniform, "conversations": conversations}
"""Those, and two on which the policies differ little."""
