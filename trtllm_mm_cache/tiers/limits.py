"""How long a tier may take, and when it is offered what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtllm_mm_cache.settings import MB

_WAITING_SHARE = 4  # offers that wait pin at most a quarter of an arena


@dataclass(frozen=True)
class TierLimits:
    """How long a tier may take, and when it is offered what.

    A lookup has `lookup_s`, a read `fetch_s` and the time of its bytes at `bytes_per_s`. An item whose turn
    at one of `threads` has not come after `turn_s` is a miss. After `failures` in a row the tier is passed
    over, and tried again every `retry_s`. Stored is what is used `at_use` times; what waits to be stored pins
    at most `waiting_bytes` of the arena.
    """

    lookup_s: float = 0.05
    fetch_s: float = 0.1
    bytes_per_s: float = 200 * MB
    turn_s: float = 0.5
    threads: int = 4
    failures: int = 3
    retry_s: float = 10.0
    at_use: int = 2
    waiting_bytes: int = 256 * MB

    @classmethod
    def waiting_for(cls, arenas: Iterable[int]) -> int:
        """Return `waiting_bytes` for a worker with `arenas` of these sizes."""
        return min(cls.waiting_bytes, *(size // _WAITING_SHARE for size in arenas))
