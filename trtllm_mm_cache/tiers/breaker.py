"""Circuit breakers: an encode worker that keeps failing is passed over, then tried again with one call.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.errors import (
    EmbeddingMismatchError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    MmCacheError,
    NotAMemberError,
    ProtocolMismatchError,
    TransferError,
)
from trtllm_mm_cache.observability.metrics import counter, samples

logger = logging.getLogger(__name__)

BreakerState = Literal["closed", "open", "half-open"]

STATES: Final[tuple[BreakerState, ...]] = ("closed", "open", "half-open")

_AT_FAULT = (
    EncodeUnavailableError,
    EncodeTimeoutError,
    NotAMemberError,
    ProtocolMismatchError,
    TransferError,
)
_OF_THE_ITEM = EmbeddingMismatchError
"""What speaks against the instance is how an embedding came: not at all, late, damaged. What an embedding is
speaks of the item: a tower that fails or makes NaN of it, rows that do not fit it. A refusal (a broken image,
a full queue) shows that the instance lives. So no client's item can shut others out."""


@dataclass
class _Breaker:
    failures: int = 0
    open_until: float | None = None
    probing: bool = False


class CircuitBreakers(Collector):
    """One breaker for each encode worker instance. For use from one event loop.

    `clock` counts seconds; `describe` names an instance in the log. `opened` and `passed_over` count since
    the start.
    """

    def __init__(
        self,
        *,
        failures: int,
        retry_s: float,
        clock: Callable[[], float] = time.monotonic,
        describe: Callable[[int], str] = "encode worker {:x}".format,
    ) -> None:
        self._describe = describe
        self._failures = failures
        self._retry_s = retry_s
        self._clock = clock
        self._breakers: dict[int, _Breaker] = {}
        self.opened = self.passed_over = 0

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
            self.passed_over += 1
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
        except _OF_THE_ITEM:
            self._succeeded(instance, breaker)
            raise
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

    def states(self) -> dict[int, BreakerState]:
        """Return the state of every instance that was called. Any thread."""
        now = self._clock()
        return {instance: _state(breaker, now) for instance, breaker in tuple(self._breakers.items())}

    def collect(self) -> Iterable[Metric]:
        """Yield how many breakers are in which state, and how often they opened and refused."""
        states = list(self.states().values())
        yield samples(
            GaugeMetricFamily,
            "encode_breakers",
            "Encode workers that were called, by the state of their breaker.",
            [({"state": state}, states.count(state)) for state in STATES],
        )
        yield counter("encode_breaker_opened", "Breakers that opened.", self.opened)
        yield counter(
            "encode_breaker_passed_over", "Times that an encode worker was passed over.", self.passed_over
        )

    def _failed(self, instance: int, breaker: _Breaker) -> None:
        breaker.failures += 1
        if breaker.failures < self._failures:
            return
        if breaker.open_until is None:
            self.opened += 1
            logger.warning(
                "%s failed %d times in a row: it is passed over and tried again every %g s",
                self._describe(instance),
                breaker.failures,
                self._retry_s,
            )
        breaker.open_until = self._clock() + self._retry_s

    def _succeeded(self, instance: int, breaker: _Breaker) -> None:
        if breaker.open_until is not None:
            logger.info("%s answers again", self._describe(instance))
        breaker.failures = 0
        breaker.open_until = None


def _state(breaker: _Breaker, now: float) -> BreakerState:
    if breaker.open_until is None:
        return "closed"
    return "half-open" if breaker.probing or now >= breaker.open_until else "open"
