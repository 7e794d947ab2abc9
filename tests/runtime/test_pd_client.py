"""Which PD worker a request goes to. How workers are called: `tests/frontend/test_pd_workers.py`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.runtime.test_adapters import PeerControl
from trtllm_mm_cache.errors import PdUnavailableError
from trtllm_mm_cache.runtime.adapters import AdapterDirectory
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.pd_client import PdWorkers

DIGESTS = [random.Random(number).randbytes(8) for number in range(2000)]


class Listed:
    """Discovery's list of workers."""

    def __init__(self, instances: Iterable[int]) -> None:
        self.instances = list(instances)

    def instance_ids(self) -> list[int]:
        return self.instances


def workers(count: int = 4) -> PdWorkers:
    return among(*range(1, count + 1))


def among(*instances: int) -> PdWorkers:
    return PdWorkers(Listed(instances), Membership(b"x" * 32), AdapterDirectory(PeerControl(), list))


def busy(pd: PdWorkers, running: dict[int, int]) -> None:
    pd._running = Counter(running)


def test_the_same_items_go_to_the_same_worker() -> None:
    pd, other = workers(), workers()
    for digest in DIGESTS[:50]:
        assert {pd._choose([digest], []), other._choose([digest], []), pd._choose([digest] * 3, [])} == {
            pd._choose([digest], [])
        }


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_many_items_are_spread_evenly(count: int) -> None:
    pd = workers(count)
    homes = Counter(pd._choose([digest], []) for digest in DIGESTS)
    share = len(DIGESTS) / count
    assert len(homes) == count
    assert all(0.8 * share < found < 1.2 * share for found in homes.values())


def test_a_request_goes_where_most_of_its_items_are() -> None:
    pd = workers()
    home = {digest: pd._choose([digest], []) for digest in DIGESTS[:40]}
    here = [digest for digest in home if home[digest] == 1][:2]
    there = next(digest for digest in home if home[digest] == 2)
    assert pd._choose([there, *here], []) == 1


def test_when_a_worker_goes_only_its_items_move() -> None:
    before, after = workers(4), among(1, 2, 4)
    for digest in DIGESTS[:500]:
        home = before._choose([digest], [])
        if home != 3:
            assert after._choose([digest], []) == home


def test_a_worker_with_much_more_under_way_is_passed_over_for_the_next_in_the_items_order() -> None:
    pd = workers()
    digest = DIGESTS[0]
    home = pd._choose([digest], [])
    second = pd._choose([digest], [home])
    busy(pd, {home: 1})
    assert pd._choose([digest], []) == home  # a little more is no reason
    busy(pd, {home: 40, second: 3})
    assert pd._choose([digest], []) == second
    busy(pd, dict.fromkeys(range(1, 5), 40))
    assert pd._choose([digest], []) == home  # all alike


def test_one_item_that_all_want_is_served_by_all() -> None:
    pd = workers()
    for _ in range(400):
        pd._running[pd._choose([DIGESTS[0]], [])] += 1
    assert len(pd._running) == 4
    assert max(pd._running.values()) <= 1.25 * 100 + 2


def test_text_goes_to_the_worker_with_least_under_way() -> None:
    pd = workers()
    busy(pd, {1: 3, 2: 1, 3: 2, 4: 5})
    assert pd._choose([], []) == 2
    assert pd._choose([], [2]) == 3


@pytest.mark.parametrize("items", [[], DIGESTS[:2]])
def test_a_worker_that_was_tried_is_not_tried_again(items: list[bytes]) -> None:
    pd = workers(3)
    tried: list[int] = []
    for _ in range(3):
        tried.append(pd._choose(items, tried))
    assert sorted(tried) == [1, 2, 3]
    with pytest.raises(PdUnavailableError, match="no PD worker can take this request now"):
        pd._choose(items, tried)


def test_without_workers_it_is_said_at_once() -> None:
    with pytest.raises(PdUnavailableError):
        workers(0)._choose([], [])


async def test_a_request_for_an_adapter_goes_to_workers_that_have_it() -> None:
    control = PeerControl(w1=[], w2=["cats"], w3=["cats", "dogs"], w4=[])
    directory = AdapterDirectory(control, lambda: [1, 2, 3, 4])
    pd = PdWorkers(Listed([1, 2, 3, 4]), Membership(b"x" * 32), directory)
    assert await directory.knows("cats")
    homes = {pd._choose([digest], [], "cats") for digest in DIGESTS[:50]}
    assert homes == {2, 3}
    assert pd._choose([], [2], "cats") == 3
    assert pd._choose(DIGESTS[:1], [], "dogs") == 3
    with pytest.raises(PdUnavailableError):
        pd._choose([], [3], "dogs")
