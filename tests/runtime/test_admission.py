"""Bounds on what is under way."""

from __future__ import annotations

import pytest

from trtllm_mm_cache.errors import OverloadedError
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
