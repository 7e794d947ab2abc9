"""Bounds on what is under way."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from trtllm_mm_cache.errors import MediaTooLargeError, OverloadedError
from trtllm_mm_cache.runtime.admission import Admission


def refusal() -> OverloadedError:
    return OverloadedError("full")


def test_items_and_bytes_are_bounded_and_come_back_however_the_work_ends() -> None:
    admission = Admission(max_items=3, max_bytes=100, refusal=refusal)
    with admission.admitted(60):
        with pytest.raises(OverloadedError), admission.admitted(41):
            pass
        with admission.admitted(40), admission.admitted(0):
            assert (admission.items, admission.nbytes) == (3, 100)
            with pytest.raises(OverloadedError), admission.admitted(0):
                pass
        with pytest.raises(KeyError), admission.admitted(40):
            raise KeyError
    assert (admission.items, admission.nbytes, admission.refused) == (0, 0, 2)


def test_one_item_that_is_larger_than_the_bound_is_served_alone() -> None:
    admission = Admission(max_items=9, max_bytes=100, refusal=refusal)
    with admission.admitted(1000), pytest.raises(OverloadedError), admission.admitted(1):
        pass
    with admission.admitted(1), pytest.raises(OverloadedError), admission.admitted(1000):
        pass


def too_large() -> MediaTooLargeError:
    return MediaTooLargeError("never fits")


def test_what_arrives_piece_by_piece_is_bounded_as_it_grows() -> None:
    admission = Admission(max_items=9, max_bytes=100, refusal=refusal, too_large=too_large)
    with admission.admitted() as one, admission.admitted() as other:
        one.grow(70)
        with pytest.raises(OverloadedError):
            other.grow(31)
        other.grow(30)
        one.shrink(60)
        with pytest.raises(MediaTooLargeError):
            other.grow(71)
        other.grow(60)
        assert (admission.nbytes, one.nbytes, other.nbytes) == (100, 10, 90)
        one.shrink(1000)
        assert admission.nbytes == 90
    assert (admission.items, admission.nbytes, admission.refused) == (0, 0, 2)


def test_what_can_never_fit_is_told_so_even_when_it_is_alone() -> None:
    admission = Admission(max_items=9, max_bytes=100, refusal=refusal, too_large=too_large)
    with pytest.raises(MediaTooLargeError), admission.admitted(101):
        pass
    assert (admission.items, admission.nbytes, admission.refused) == (0, 0, 1)


def test_large_items_leave_room_for_small_ones_and_for_those_without_bytes() -> None:
    admission = Admission(max_items=999, max_bytes=25600, refusal=refusal, room_for_small=True)
    with admission.admitted(10000), admission.admitted(9200), ExitStack() as small:
        with pytest.raises(OverloadedError), admission.admitted(100):
            pass
        for _ in range(64):
            small.enter_context(admission.admitted(99))
        assert admission.nbytes == 19200 + 64 * 99
        with pytest.raises(OverloadedError), admission.admitted(99):
            pass
        with admission.admitted():
            pass
