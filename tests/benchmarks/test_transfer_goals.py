"""What `benchmarks.transfer` says of its goals, from given times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.transfer import goals
from benchmarks.transfer_ways import REPOSITORY, ways_of


def said(memcpy_ms: float, **committed_ms: float) -> dict[str, bool]:
    ways = {name: {"committed_ms": ms, "third_quartile_ms": ms * 1.1} for name, ms in committed_ms.items()}
    return {goal["goal"].split(" <=")[0]: goal["met"] for goal in goals(memcpy_ms, ways)}


@pytest.mark.parametrize(("ours", "met"), [(1.9, True), (1.91, False)])
def test_one_host_is_one_and_a_half_memcpys_and_a_bit(ours: float, met: bool) -> None:
    assert said(1.0, ours=ours, ours_large_pages=1.0) == {"ours": met, "ours_large_pages": True}


@pytest.mark.parametrize(("nixl", "met"), [(4.4, True), (4.41, False)])
def test_nixl_is_four_memcpys_and_a_bit_on_one_host_alone(nixl: float, met: bool) -> None:
    assert said(1.0, ours=1.0, ours_nixl=nixl) == {"ours": True, "ours_nixl": met}
    assert said(1.0, ours_nixl=nixl) == {}


@pytest.mark.parametrize(("local", "met"), [(2.0, True), (1.99, False)])
def test_dynamos_file_takes_twice_as_long(local: float, met: bool) -> None:
    assert said(1.0, ours=1.0, local=local)["ours twice as fast as Dynamo's local"] is met


@pytest.mark.parametrize(("checked", "met"), [(1.1, True), (1.2, False)])
def test_checks_are_seen_beyond_the_quartile_without_them(checked: float, met: bool) -> None:
    assert said(9.0, ours_tcp=checked, ours_tcp_unchecked=1.0) == {"ours_tcp: checks not to be seen": met}


def test_another_checkout_runs_its_own_code(tmp_path: Path) -> None:
    ways = ways_of(two_hosts=False, before=tmp_path, dynamo=("local",), large_pages=None)
    assert ways["before"].variables(None)["PYTHONPATH"] == str(tmp_path)
    assert ways["ours"].variables(None)["PYTHONPATH"] == str(REPOSITORY)
    assert "ours_large_pages" not in ways
    assert "local" not in ways_of(two_hosts=True, before=None, dynamo=("local",), large_pages=None)
