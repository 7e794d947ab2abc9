"""Entries move without the guard: what else happens to the cache meanwhile, and what comes of the move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from trtllm_mm_cache.cache.arena.extents import Extent
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.errors import ArenaFullError, IntegrityError

UNIT = 256 * 1024
UNITS = 16
T = TypeVar("T")


class Stage:
    """A full cache with holes of one unit, and a thread that reserves three: it stands in its copy.

    `within` runs something in another thread and fails where it does not end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manager = MultimodalEmbeddingCacheManager(UNITS * UNIT)
        for number in range(UNITS):
            self.commit(str(number), 1).release()
        self.before = {key: self.offset(key) for key in self.manager.keys()}
        for number in (3, 8, 13):
            self.manager.drop(str(number))
        self.copying, self.go_on = threading.Event(), threading.Event()
        self.moving: list[str] = []
        self.pool = ThreadPoolExecutor(4)
        copy = self.manager.arena.copy

        def late(source: Extent, target: Extent) -> None:
            self.moving += [key for key, offset in self.before.items() if offset == source.offset]
            self.copying.set()
            assert self.go_on.wait(30)
            copy(source, target)

        monkeypatch.setattr(self.manager.arena, "copy", late)

    def begin(self, key: str = "new", units: int = 3) -> Future[Reservation]:
        reserving = self.pool.submit(self.manager.reserve, key, units * UNIT, owner="test")
        assert self.copying.wait(30), "nothing was moved"
        return reserving

    def end(self, reserving: Future[Reservation]) -> Reservation:
        self.go_on.set()
        return reserving.result(30)

    def within(self, work: Callable[[], T]) -> T:
        return self.pool.submit(work).result(10)

    def offset(self, key: str) -> int:
        lease = self.lease(key)
        lease.release()
        return lease.offset

    def lease(self, key: str) -> Lease:
        lease = self.manager.lease(key)
        assert lease is not None
        assert lease.tensor.eq(len(key) + ord(key[-1])).all(), "other bytes"
        return lease

    def commit(self, key: str, units: int) -> Lease:
        return self.fill(self.manager.reserve(key, units * UNIT, owner="test"))

    def fill(self, reservation: Reservation) -> Lease:
        reservation.view.fill_(len(reservation.key) + ord(reservation.key[-1]))
        return reservation.commit(dtype=torch.uint8, shape=(reservation.nbytes,))

    def close(self) -> None:
        self.go_on.set()
        self.pool.shutdown()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(monkeypatch)
    yield stage
    stage.close()


def test_look_ups_releases_drops_and_snapshots_go_on_while_entries_are_copied(stage: Stage) -> None:
    reserving = stage.begin()
    still, moving = "0", stage.moving[0]
    for key in (still, moving):
        lease = stage.within(lambda key=key: stage.lease(key))
        stage.within(lease.release)
    assert stage.within(lambda: stage.manager.drop("1"))
    stage.within(lambda: stage.commit("quick", 1)).release()
    stage.within(stage.manager.check_integrity)
    assert stage.within(stage.manager.statistics).reservations == 0
    assert not reserving.done()
    stage.fill(stage.end(reserving)).release()
    stage.manager.check_integrity()
    assert stage.offset(moving) != stage.before[moving], "released before the copy ended: it moves"
    assert stage.manager.statistics().moves == len(stage.moving)
    for key in stage.manager.keys():
        stage.lease(key).release()


def test_what_is_leased_meanwhile_stays_and_other_room_is_made(stage: Stage) -> None:
    reserving = stage.begin()
    moving = stage.moving[0]
    lease = stage.within(lambda: stage.lease(moving))
    view = lease.tensor
    reservation = stage.end(reserving)
    assert lease.offset == stage.before[moving]
    assert reservation.nbytes == 3 * UNIT
    stage.fill(reservation).release()
    assert view.eq(len(moving) + ord(moving[-1])).all()
    assert stage.manager.statistics().evictions <= 1
    lease.release()


@pytest.mark.parametrize("how", ["drop", "replace"])
def test_what_is_dropped_or_replaced_meanwhile_leaves_its_bytes(stage: Stage, how: str) -> None:
    reserving = stage.begin()
    moving = stage.moving[0]
    if how == "drop":
        assert stage.within(lambda: stage.manager.drop(moving))
    else:
        stage.within(lambda: stage.commit(moving, 1)).release()
    assert stage.manager.statistics().withdrawn_bytes == UNIT, "the copy reads them"
    stage.end(reserving).abandon()
    assert stage.manager.statistics().withdrawn_bytes == 0
    assert stage.manager.peek(moving) == (how == "replace")


def test_two_that_make_room_at_once_both_get_it_within_the_budget(stage: Stage) -> None:
    first = stage.begin()
    second = stage.pool.submit(stage.manager.reserve, "second", 4 * UNIT, owner="test")
    stage.within(stage.manager.check_integrity)
    stage.go_on.set()
    granted = [first.result(30), second.result(30)]
    assert sorted(reservation.nbytes for reservation in granted) == [3 * UNIT, 4 * UNIT]
    stage.manager.check_integrity()
    assert stage.manager.statistics().arena.used_bytes == UNITS * UNIT
    assert stage.manager.statistics().evicted_bytes == 4 * UNIT
    for reservation in granted:
        stage.fill(reservation).release()
    for key in stage.manager.keys():
        stage.lease(key).release()


def test_room_that_only_a_move_withholds_is_waited_for_and_not_refused(stage: Stage) -> None:
    """The whole cache but the first reservation: with entries on the move there are not bytes enough."""
    first = stage.begin()
    second = stage.pool.submit(stage.manager.reserve, "second", (UNITS - 3) * UNIT, owner="test")
    stage.go_on.set()
    try:
        assert second.result(30).nbytes == (UNITS - 3) * UNIT
    except ArenaFullError:
        pytest.fail("refused although every entry was idle")
    finally:
        first.result(30).abandon()
    second.result().abandon()


def test_close_during_a_move_ends_it_and_refuses_the_room(stage: Stage) -> None:
    reserving = stage.begin()
    lease = stage.within(lambda: stage.lease(stage.moving[0]))
    stage.within(stage.manager.close)
    stage.go_on.set()
    with pytest.raises(IntegrityError, match="closed"):
        reserving.result(30)
    stage.manager.check_integrity()
    assert lease.tensor.eq(len(lease.key) + ord(lease.key[-1])).all()
    lease.release()
    assert stage.manager.statistics().arena.extents == 0


def test_a_copy_that_fails_moves_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Extent, target: Extent) -> None:
        raise MemoryError

    monkeypatch.setattr(stage.manager.arena, "copy", fail)
    before = stage.manager.statistics()
    with pytest.raises(MemoryError):
        stage.manager.reserve("new", 3 * UNIT, owner="test")
    assert stage.manager.statistics() == before
    for key in stage.manager.keys():
        assert stage.offset(key) == stage.before[key]


def test_a_set_that_loses_its_room_while_it_copies_tells_what_it_removed(stage: Stage) -> None:
    from trtllm_mm_cache.cache.manager import CachedEmbedding

    entry = CachedEmbedding(torch.zeros(3 * UNIT, dtype=torch.uint8))
    stage.manager.get("0")  # 1 is the next victim
    setting = stage.pool.submit(stage.manager.set_with_delta, "2", entry)
    assert stage.copying.wait(30)
    leases = [stage.within(lambda key=key: stage.lease(key)) for key in stage.manager.keys()]
    stage.go_on.set()
    stored, added, removed = setting.result(30)
    assert (stored, added) == (False, [])
    assert removed == ["2"]
    assert not stage.manager.peek("2")
    for lease in leases:
        lease.release()
