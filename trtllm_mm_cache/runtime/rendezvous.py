"""Rendezvous hashing: which worker an item belongs to, found alike by everyone that sees the same workers."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash


def rendezvous_rank(digest: bytes, instances: Iterable[int]) -> list[int]:
    """Order `instances` by rendezvous hashing: the first one is the home of what has this `digest`.

    Every process that sees the same instances finds the same order, and when one instance goes, only what
    had its home there moves.
    """

    def weight(instance: int) -> tuple[int, int]:
        return xxhash.xxh3_64_intdigest(instance.to_bytes(8, "big") + digest), instance

    return sorted(instances, key=weight, reverse=True)
