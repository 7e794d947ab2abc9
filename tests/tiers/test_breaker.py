"""The circuit breaker of each encode worker, on a clock that the test sets."""

from __future__ import annotations

import contextlib

import pytest

from tests.pd.bench import SetClock
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    EncodeFailedError,
    EncodeOverloadedError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    InvalidEmbeddingError,
    InvalidImageError,
    MmCacheError,
    ProtocolMismatchError,
)
from trtllm_mm_cache.tiers.breaker import CircuitBreakers


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def breakers(clock: SetClock) -> CircuitBreakers:
    return CircuitBreakers(failures=3, retry_s=10, clock=clock)


def call(breakers: CircuitBreakers, instance: int, error: BaseException | None = None) -> None:
    """Make one call that ends with `error`."""
    assert breakers.admits(instance)
    with contextlib.suppress(MmCacheError, GeneratorExit), breakers.calling(instance):
        if error is not None:
            raise error


def opened(breakers: CircuitBreakers, instance: int) -> None:
    for _ in range(3):
        call(breakers, instance, EncodeUnavailableError("gone"))
    assert not breakers.admits(instance)


@pytest.mark.parametrize(
    "error", [EncodeUnavailableError, EncodeTimeoutError, ChecksumMismatchError, ProtocolMismatchError]
)
def test_failures_in_a_row_open_it_and_touch_no_other(
    breakers: CircuitBreakers, error: type[MmCacheError]
) -> None:
    for _ in range(2):
        call(breakers, 1, error("failed"))
    call(breakers, 1)
    for _ in range(2):
        call(breakers, 1, error("failed"))
        assert breakers.states() == {1: "closed"}
    call(breakers, 1, error("failed"))
    assert not breakers.admits(1)
    assert breakers.admits(2)
    assert breakers.states() == {1: "open"}
    assert (breakers.opened, breakers.passed_over) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [
        InvalidImageError,
        EncodeOverloadedError,
        EncodeFailedError,
        InvalidEmbeddingError,
        EmbeddingMismatchError,
    ],
)
def test_a_refusal_shows_that_it_lives(breakers: CircuitBreakers, error: type[MmCacheError]) -> None:
    for _ in range(10):
        call(breakers, 1, error("this image"))
    assert breakers.states() == {1: "closed"}


def test_one_probe_at_a_time_closes_it_or_opens_it_again(breakers: CircuitBreakers, clock: SetClock) -> None:
    opened(breakers, 1)
    clock.now = 9.9
    assert not breakers.admits(1)
    clock.now = 10
    assert breakers.states() == {1: "half-open"}
    with contextlib.suppress(EncodeTimeoutError), breakers.calling(1):
        assert not breakers.admits(1), "a second call while the probe is under way"
        raise EncodeTimeoutError("still")
    assert not breakers.admits(1)
    clock.now = 20
    call(breakers, 1)
    assert breakers.states() == {1: "closed"}
    assert breakers.opened == 1


def test_a_probe_that_is_cancelled_says_nothing_and_the_next_call_is_the_probe(
    breakers: CircuitBreakers, clock: SetClock
) -> None:
    opened(breakers, 1)
    clock.now = 10
    call(breakers, 1, GeneratorExit())
    assert breakers.states() == {1: "half-open"}
    call(breakers, 1)
    assert breakers.states() == {1: "closed"}


def test_a_call_from_before_it_opened_counts_when_it_ends(breakers: CircuitBreakers, clock: SetClock) -> None:
    early = breakers.calling(1)
    early.__enter__()
    opened(breakers, 1)
    clock.now = 10
    with breakers.calling(1):
        assert not breakers.admits(1)
        early.__exit__(None, None, None)
        breakers.keep([1])
        assert breakers.states() == {1: "closed"}, "what it brought is news enough"


def test_one_that_went_and_came_back_begins_closed(breakers: CircuitBreakers) -> None:
    opened(breakers, 1)
    breakers.keep([2])
    breakers.keep([1, 2])
    assert breakers.admits(1)
    assert breakers.states() == {}
