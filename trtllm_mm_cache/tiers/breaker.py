"""Circuit breakers: an encode worker that keeps failing is left alone for a while, then tried with one call.

    closed ──`failures` failures in a row──▶ open ──after `retry_s`──▶ half-open: one call, the probe
       ▲                                      ▲                            │
       └──────────────── success ─────────────┼────────────────────────────┤
                                              └────────── failure ─────────┘

A breaker belongs to an instance as long as discovery shows it. One that went and came back, under the
same id or another, begins closed: whoever restarted it is not punished for what it was before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from trtllm_mm_cache.errors import (
    EncodeTimeoutError,
    EncodeUnavailableError,
    MmCacheError,
    ProtocolMismatchError,
    TransferError,
)

logger = logging.getLogger(__name__)

BreakerState = Literal["closed", "open", "half-open"]

_AT_FAULT = (EncodeUnavailableError, EncodeTimeoutError, ProtocolMismatchError, TransferError)
"""Failures that speak against the instance. Its refusals (a broken image, a full queue) show that it lives,
and a vision tower that fails may be failing on what this client sends: no client may shut others out."""


@dataclass(frozen=True)
class BreakerStatistics:
    """A snapshot. `states` has every instance that was called; `opened` and `refused` count since start."""

    states: Mapping[int, BreakerState]
    opened: int
    refused: int


@dataclass
class _Breaker:
    failures: int = 0
    open_until: float | None = None
    probing: bool = False


class CircuitBreakers:
    """One breaker for each encode worker instance. For use from one event loop.

    `clock` counts seconds.
    """

    def __init__(self, *, failures: int, retry_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._retry_s = retry_s
        self._clock = clock
        self._breakers: dict[int, _Breaker] = {}
        self._opened = self._refused = 0

    def keep(self, alive: Iterable[int]) -> None:
        """Forget every instance that is not `alive`."""
        for gone in self._breakers.keys() - set(alive):
            del self._breakers[gone]

    def admits(self, instance: int) -> bool:
        """Whether `instance` may be called now; if so, `calling` must follow in this turn of the loop."""
        breaker = self._breakers.get(instance)
        if breaker is None or breaker.open_until is None:
            return True
        if breaker.probing or self._clock() < breaker.open_until:
            self._refused += 1
            return False
        return True

    @contextmanager
    def calling(self, instance: int) -> Iterator[None]:
        """Wrap one call of an instance that was admitted, and judge the instance by how it ends.

        A call that is cancelled says nothing; if it was the probe, the next call is.
        """
        breaker = self._breakers.setdefault(instance, _Breaker())
        probe = breaker.open_until is not None
        breaker.probing |= probe
        try:
            yield
        except _AT_FAULT:
            self._failed(instance, breaker)
            raise
        except MmCacheError:
            self._succeeded(instance, breaker)
            raise
        else:
            self._succeeded(instance, breaker)
        finally:
            if probe:
                breaker.probing = False

    def statistics(self) -> BreakerStatistics:
        """Return a snapshot."""
        now = self._clock()
        states = {instance: _state(breaker, now) for instance, breaker in self._breakers.items()}
        return BreakerStatistics(states, self._opened, self._refused)

    def _failed(self, instance: int, breaker: _Breaker) -> None:
        breaker.failures += 1
        if breaker.failures < self._failures:
            return
        if breaker.open_until is None:
            self._opened += 1
            logger.warning(
                "encode worker %x failed %d times in a row: it is left alone and tried again every %g s",
                instance,
                breaker.failures,
                self._retry_s,
            )
        breaker.open_until = self._clock() + self._retry_s

    def _succeeded(self, instance: int, breaker: _Breaker) -> None:
        if breaker.open_until is not None:
            logger.info("encode worker %x answers again", instance)
        breaker.failures = 0
        breaker.open_until = None


def _state(breaker: _Breaker, now: float) -> BreakerState:
    if breaker.open_until is None:
        return "closed"
    return "half-open" if breaker.probing or now >= breaker.open_until else "open"
