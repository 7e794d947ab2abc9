"""Reservations and leases: every state with every step, and what dropping them does."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Generator

import pytest
import torch

from trtllm_mm_cache.cache.entry import TRANSITIONS, EmbeddingMetadata, EntryState
from trtllm_mm_cache.cache.manager import (
    CachedEmbedding,
    Lease,
    MultimodalEmbeddingCacheManager,
    Reservation,
)
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EmbeddingMismatchError,
    EntryTooLargeError,
    IntegrityError,
)

CAPACITY = 4096


@pytest.fixture
def manager() -> MultimodalEmbeddingCacheManager:
    return MultimodalEmbeddingCacheManager(CAPACITY)


def _commit(reservation: Reservation) -> Lease:
    return reservation.commit(dtype=torch.uint8, shape=(reservation.nbytes,))


def _pass(reservation: Reservation) -> Lease:
    return reservation.commit(dtype=torch.uint8, shape=(reservation.nbytes,), retain=False)


STEPS: dict[str, Callable[[Reservation], object]] = {
    "commit": _commit,
    "pass": _pass,
    "abandon": Reservation.abandon,
    "quarantine": Reservation.quarantine,
    "settle": Reservation.settle,
}
# How to bring a fresh reservation into each state.
PATHS: dict[EntryState, tuple[str, ...]] = {
    EntryState.RESERVED: (),
    EntryState.QUARANTINED: ("quarantine",),
    EntryState.VISIBLE: ("commit",),
    EntryState.FREED: ("abandon",),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", PATHS)
def test_every_step_from_every_state(
    manager: MultimodalEmbeddingCacheManager, state: EntryState, step: str
) -> None:
    reservation = manager.reserve("a", 128, owner="the test")
    kept = [STEPS[name](reservation) for name in PATHS[state]]
    assert reservation.state is state
    if (state, step) in TRANSITIONS:
        kept.append(STEPS[step](reservation))
        following = TRANSITIONS[state, step]
        # withdrawn without a holder is free at once; what was passed on is held by its lease
        freed = following is EntryState.WITHDRAWN and step != "pass"
        assert reservation.state is (EntryState.FREED if freed else following)
    else:
        with pytest.raises(IntegrityError, match=f"cannot {step}.*{state.value}.*the test"):
            STEPS[step](reservation)
        assert reservation.state is state
    manager.check_integrity()
    if reservation.state is EntryState.QUARANTINED:
        reservation.settle()


def test_commit_shows_the_entry_and_returns_a_lease(manager: MultimodalEmbeddingCacheManager) -> None:
    reservation = manager.reserve("a", 24, owner="test")
    assert not manager.peek("a")
    assert manager.get("a") is None
    assert (reservation.key, reservation.nbytes, reservation.owner) == ("a", 24, "test")
    assert reservation.address == manager.arena.base_address + reservation.offset
    reservation.view.copy_(torch.arange(24, dtype=torch.uint8))
    metadata = EmbeddingMetadata(grid_thw=(1, 2, 3), placeholder="<image>", encode_seconds=0.5, checksum=7)
    with reservation.commit(dtype=torch.int16, shape=(3, 4), metadata=metadata) as lease:
        assert (lease.key, lease.nbytes) == ("a", 24)
        assert (lease.address, lease.offset) == (reservation.address, reservation.offset)
        tensor = lease.tensor
        assert tensor is lease.tensor
        assert tensor.data_ptr() == lease.address
        assert tensor.shape == lease.shape == (3, 4)
        assert tensor.dtype == lease.dtype == torch.int16
        assert bytes(tensor.view(torch.uint8).flatten().tolist()) == bytes(range(24))
        assert lease.metadata == metadata
        assert manager.statistics().leased_bytes == 24
    shown = manager.get("a")
    assert shown is not None
    assert shown[1:] == ([[1, 2, 3]], None, None, None)
    assert lease.released
    for use in (lease.clone, lease.handle, lambda: lease.tensor):
        with pytest.raises(IntegrityError, match="released"):
            use()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.uint8, (23,)),
        (torch.float32, (3, 4)),
        (torch.int16, (-3, -4)),
        (torch.int16, ()),
        (torch.int8, (0,)),
    ],
)
def test_a_shape_that_is_not_the_size_is_refused(
    manager: MultimodalEmbeddingCacheManager, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    reservation = manager.reserve("a", 24, owner="test")
    with pytest.raises(EmbeddingMismatchError, match="24 bytes were reserved"):
        reservation.commit(dtype=dtype, shape=shape)
    assert not manager.peek("a")
    reservation.abandon()


@pytest.mark.parametrize("nbytes", [0, 23, 25])
def test_a_tensor_of_another_size_is_refused(manager: MultimodalEmbeddingCacheManager, nbytes: int) -> None:
    reservation = manager.reserve("a", 24, owner="test")
    with pytest.raises(EmbeddingMismatchError, match="24 reserved bytes"):
        reservation.write(torch.ones(nbytes, dtype=torch.uint8))
    reservation.abandon()


def test_a_commit_replaces_without_an_eviction(manager: MultimodalEmbeddingCacheManager) -> None:
    first = _commit(manager.reserve("a", 100, owner="test"))
    first.tensor.fill_(1)
    second = _commit(manager.reserve("a", 200, owner="test"))
    second.tensor.fill_(2)
    assert manager.keys() == ["a"]
    assert first.tensor.eq(1).all()
    current = manager.lease("a")
    assert current is not None
    assert current.nbytes == 200
    snapshot = manager.statistics()
    assert (snapshot.evictions, snapshot.withdrawn_entries, snapshot.withdrawn_bytes) == (0, 1, 100)
    first.release()
    assert manager.statistics().withdrawn_entries == 0


def test_leases_count_hits_and_order_and_peek_does_not(manager: MultimodalEmbeddingCacheManager) -> None:
    for key in "abc":
        _commit(manager.reserve(key, 100, owner="test")).release()
    assert manager.peek("a")
    assert "b" in manager
    assert "x" not in manager
    assert manager.keys() == ["a", "b", "c"]
    lease = manager.lease("a")
    assert lease is not None
    lease.release()
    assert manager.lease("x") is None
    assert manager.keys() == ["b", "c", "a"]
    snapshot = manager.statistics()
    assert (snapshot.hits, snapshot.misses, snapshot.hit_bytes) == (1, 1, 100)


def test_every_lease_and_clone_pins_until_its_own_release(manager: MultimodalEmbeddingCacheManager) -> None:
    lease = _commit(manager.reserve("a", CAPACITY, owner="test"))
    clone = lease.clone()
    lease.release()
    lease.release()
    with pytest.raises(ArenaFullError, match="in use by running requests"):
        manager.reserve("b", 1, owner="test")
    assert manager.peek("a"), "a refused reservation evicts nothing"
    clone.release()
    manager.reserve("b", 1, owner="test").abandon()
    assert not manager.peek("a")


def test_a_dropped_lease_frees(manager: MultimodalEmbeddingCacheManager) -> None:
    lease: Lease | None = _commit(manager.reserve("a", CAPACITY, owner="test"))
    assert manager.statistics().leased_entries == 1
    del lease
    gc.collect()
    assert manager.statistics().leased_entries == 0
    manager.reserve("b", CAPACITY, owner="test").abandon()


def test_more_than_the_cache_is_refused_at_once(manager: MultimodalEmbeddingCacheManager) -> None:
    with pytest.raises(EntryTooLargeError, match=f"{CAPACITY + 1} bytes is larger than the whole cache"):
        manager.reserve("a", CAPACITY + 1, owner="test")


def test_a_forgotten_reservation_is_reported_with_its_owner_and_freed(
    manager: MultimodalEmbeddingCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    reservation: Reservation | None = manager.reserve("a", CAPACITY, owner="a careless caller")
    assert manager.statistics().reserved_bytes == CAPACITY
    del reservation
    gc.collect()
    with caplog.at_level(logging.ERROR):
        manager.reserve("b", CAPACITY, owner="test").abandon()
    assert "a careless caller" in caplog.text
    assert "neither committed nor abandoned" in caplog.text
    assert manager.statistics().forgotten == 1


def test_quarantine_is_ended_by_settle_alone(
    manager: MultimodalEmbeddingCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    kept = manager.reserve("a", 1000, owner="test")
    lost: Reservation | None = manager.reserve("b", 3000, owner="the lost one")
    assert lost is not None
    kept.quarantine()
    lost.quarantine()
    snapshot = manager.statistics()
    assert (snapshot.quarantined, snapshot.quarantined_bytes, snapshot.reservations) == (2, 4000, 0)
    del lost
    gc.collect()
    assert manager.clear() == 0
    assert manager.statistics().quarantined_bytes == 4000, "garbage collection must not free it"
    assert "the lost one" in caplog.text
    with pytest.raises(ArenaFullError):
        manager.reserve("c", 1000, owner="test")
    kept.settle()
    assert manager.statistics().quarantined_bytes == 3000
    manager.reserve("c", 1000, owner="test").abandon()


def test_an_abandoned_extent_is_not_used_while_its_view_lives(
    manager: MultimodalEmbeddingCacheManager,
) -> None:
    reservation = manager.reserve("a", CAPACITY, owner="test")
    view = reservation.view[10:20]
    reservation.abandon()
    with pytest.raises(ArenaFullError):
        manager.reserve("b", CAPACITY, owner="test")
    view.fill_(1)
    del view
    manager.reserve("b", CAPACITY, owner="test").abandon()


def test_drop_and_clear_hide_and_touch_no_holder(manager: MultimodalEmbeddingCacheManager) -> None:
    leases = {key: _commit(manager.reserve(key, 100, owner="test")) for key in "abc"}
    for number, lease in enumerate(leases.values()):
        lease.tensor.fill_(number)
    assert manager.drop("b")
    assert not manager.drop("b")
    assert manager.keys() == ["a", "c"]
    assert manager.clear() == 2
    assert manager.keys() == []
    manager.set("d", CachedEmbedding(torch.full((3000,), 9, dtype=torch.uint8)))
    assert [lease.tensor.unique().item() for lease in leases.values()] == [0, 1, 2]
    assert manager.statistics().evictions == 0


def test_close_lets_holders_finish(manager: MultimodalEmbeddingCacheManager) -> None:
    _commit(manager.reserve("idle", 10, owner="test")).release()
    lease = _commit(manager.reserve("a", 10, owner="test"))
    late = manager.reserve("b", 10, owner="test")
    manager.close()
    manager.close()
    for call in (
        lambda: manager.get("a"),
        lambda: manager.lease("a"),
        lambda: manager.reserve("c", 1, owner="test"),
        lambda: manager.set("c", CachedEmbedding(torch.ones(1))),
        manager.keys,
    ):
        with pytest.raises(IntegrityError, match="closed"):
            call()
    assert late.view.fill_(3).tolist() == [3] * 10
    late_lease = _commit(late)
    assert lease.clone().tensor.numel() == 10
    storage = manager.arena.storage
    del late, storage
    lease.release()
    late_lease.release()
    gc.collect()
    assert manager.statistics().arena.extents == 0
    with pytest.raises(IntegrityError, match="closed"):
        _ = manager.arena.storage


def test_close_logs_what_is_held_under_the_caches_name(caplog: pytest.LogCaptureFixture) -> None:
    manager = MultimodalEmbeddingCacheManager(CAPACITY, name="receive arena")
    lease = _commit(manager.reserve("a", 10, owner="test"))
    reservation = manager.reserve("b", 20, owner="test")
    quarantined = manager.reserve("c", 30, owner="a lost read")
    quarantined.quarantine()
    with caplog.at_level(logging.INFO):
        manager.close()
        manager.close()
    assert caplog.text.count("bytes held: leased 10, reserved 20, quarantined 30") == 1
    assert all(record.getMessage().startswith("receive arena: ") for record in caplog.records)
    assert "a lost read" in caplog.text
    lease.release()
    reservation.abandon()
    quarantined.settle()


def test_close_with_inconsistent_accounting_says_so_and_closes(caplog: pytest.LogCaptureFixture) -> None:
    manager = MultimodalEmbeddingCacheManager(CAPACITY)
    _commit(manager.reserve("a", 10, owner="test")).release()
    manager._ledger.visible_bytes += 1
    manager.close()
    manager._ledger.visible_bytes -= 1
    assert "cache: closed, accounting inconsistent" in caplog.text
    assert "visible bytes" in caplog.text
    with pytest.raises(IntegrityError, match="closed"):
        manager.get("a")


def test_capacity_zero_keeps_an_entry_as_long_as_it_has_a_holder() -> None:
    manager = MultimodalEmbeddingCacheManager(0, transfer_bytes=CAPACITY)
    assert not manager.retain
    assert manager.capacity_bytes == 0
    assert manager.arena.capacity_bytes >= CAPACITY
    assert not manager.set("set", CachedEmbedding(torch.ones(1)))
    assert manager.make_room_for("set", 1) == (False, [])
    lease = _commit(manager.reserve("a", CAPACITY, owner="test"))
    entry = manager.get("a")
    shared = manager.lease("a")
    assert entry is not None
    assert shared is not None
    with pytest.raises(ArenaFullError):
        manager.reserve("b", 1, owner="test")
    lease.release()
    shared.release()
    assert manager.peek("a"), "the tensor still holds it"
    assert manager.statistics().utilization == 0.0
    del entry
    assert not manager.peek("a")
    assert manager.keys() == []
    with pytest.raises(EntryTooLargeError):
        manager.reserve("b", CAPACITY + 1, owner="test")
    _commit(manager.reserve("b", CAPACITY, owner="test")).release()
    assert manager.statistics().evictions == 0


def test_a_finalizer_in_the_middle_of_an_operation_neither_deadlocks_nor_corrupts(
    manager: MultimodalEmbeddingCacheManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Collection may run the `finally` of an abandoned coroutine inside a cache operation of its thread."""
    lease = _commit(manager.reserve("a", 100, owner="test"))
    reading = manager.reserve("b", 100, owner="test")
    outcomes: list[str] = []

    def abandoned() -> Generator[None]:
        try:
            yield
        finally:
            lease.release()
            reading.quarantine()
            try:
                manager.lease("a")
            except IntegrityError as error:
                outcomes.append(error.message)

    generator = abandoned()
    next(generator)
    with manager._ledger.guard:
        generator.close()
    assert len(outcomes) == 1
    assert "finalizer" in outcomes[0]
    assert manager.statistics().leased_entries == 0
    assert reading.state is EntryState.QUARANTINED
    reading.settle()
