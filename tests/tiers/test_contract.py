"""What every stored tier promises, over each storage."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from tests.tiers.bench import FINGERPRINT, METADATA, NBYTES, Bench, item_of, name_of, tensor_of, until
from trtllm_mm_cache.cache.manager import Reservation
from trtllm_mm_cache.cache.scope import Selection, salt_tag
from trtllm_mm_cache.errors import InvalidEmbeddingError, MmCacheError
from trtllm_mm_cache.runtime.drops import Drops
from trtllm_mm_cache.tiers.format import EntryName, RefusedEntryError
from trtllm_mm_cache.tiers.storage import OpenEntry, Storage
from trtllm_mm_cache.tiers.stored import StoredTier


async def drop(tier: StoredTier, selection: Selection) -> int:
    return (await tier.drop(selection, deadline_s=10)).entries


async def test_what_was_kept_is_brought_to_another_process(bench: Bench) -> None:
    one, other = bench.tier(), bench.tier()
    assert not await bench.brought(one, item_of(1))
    await bench.keep(one, item_of(1))
    for tier in (one, other):
        assert await bench.brought(tier, item_of(1))
        assert not await bench.brought(tier, item_of(2))
    assert one.lookups == {"absent": 1 + 1, "hit": 1}
    assert (one.counts.written_bytes, one.counts.read_bytes) == (NBYTES, NBYTES)


async def test_a_key_is_stored_at_its_second_use(bench: Bench) -> None:
    tier = bench.tier(at_use=2)
    with bench.committed(item_of(1)) as lease:
        tier.offer(item_of(1), lease)
        assert tier.offers.waiting == (0, 0)
        tier.offer(item_of(2), lease)  # another key's first use
        assert tier.offers.waiting == (0, 0)
        tier.offer(item_of(1), lease)
    await until(lambda: tier.offers.outcomes["stored"] == 1)
    bench.cache.clear()
    assert await bench.brought(tier, item_of(1))


async def test_what_it_brought_is_not_offered_back_and_touched_after_a_while(bench: Bench) -> None:
    one, other = bench.tier(), bench.tier()
    await bench.keep(one, item_of(1))
    assert await bench.brought(other, item_of(1))
    with bench.committed(item_of(1)) as lease:
        for _ in range(3):
            other.offer(item_of(1), lease)
        assert other.offers.waiting == (0, 0)
        bench.clock.now += 61
        other.offer(item_of(1), lease)
        await until(lambda: other.offers.outcomes["present"] == 1)
    assert other.counts.written_bytes == 0


async def test_nothing_is_stored_that_may_not_be_retained(bench: Bench) -> None:
    tier = bench.tier()
    drops = Drops()
    dropped = item_of(2)
    dropped = replace(dropped, watch=drops.watch(None))
    drops.drop(Selection(key=dropped.key.hex))
    for item in (item_of(1, retain=False), dropped):
        with bench.committed(item) as lease:
            tier.offer(item, lease)
        assert tier.offers.waiting == (0, 0)
        assert not await bench.brought(tier, item)


async def test_salts_do_not_meet(bench: Bench) -> None:
    tier = bench.tier()
    ours, theirs = item_of(1, salt="ours"), item_of(1, salt="theirs")
    await bench.keep(tier, ours)
    assert await bench.brought(tier, ours)
    assert not await bench.brought(tier, theirs)
    # Not even with the key: the tag is sealed with it, or part of the name.
    with suppress(RefusedEntryError):
        assert not await bench.brought(tier, replace(theirs, key=ours.key))


@pytest.mark.parametrize(
    "other", [{"secret": b"another secret of thirty-two bytes"}, {"fingerprint": "cd" * 32}]
)
async def test_another_deployments_entries_are_not_served(bench: Bench, other: dict[str, str]) -> None:
    writer, reader = bench.tier(), bench.tier(**other)  # type: ignore[arg-type]
    await bench.keep(writer, item_of(1))
    if "secret" in other:
        with pytest.raises(RefusedEntryError):
            await bench.brought(reader, item_of(1))
        assert reader.counts.refused == {"foreign_secret": 1}
    assert not await bench.brought(reader, item_of(1))


async def test_too_old_is_a_miss_and_removed(bench: Bench) -> None:
    tier = bench.tier(max_age_s=60)
    await bench.keep(tier, item_of(1))
    bench.wall.now += 59
    assert await bench.brought(tier, item_of(1))
    bench.wall.now += 2
    with pytest.raises(RefusedEntryError):
        await bench.brought(tier, item_of(1))
    assert tier.counts.refused == {"expired": 1}
    assert not await bench.brought(tier, item_of(1))
    await bench.keep(tier, item_of(1))
    assert await bench.brought(tier, item_of(1)), "stored anew"


async def test_values_that_are_not_finite_are_refused(bench: Bench) -> None:
    tier, item = bench.tier(), item_of(1)
    reservation = bench.cache.reserve(item.key.hex, NBYTES, owner="test")
    bad = tensor_of(item.key)
    bad[-1, -1] = torch.nan
    reservation.write(bad)
    with reservation.commit(dtype=torch.float32, shape=tuple(bad.shape), metadata=METADATA) as lease:
        tier.offer(item, lease)
    await until(lambda: tier.offers.outcomes["stored"] == 1)
    bench.cache.clear()
    with pytest.raises(InvalidEmbeddingError):
        await bench.brought(tier, item)
    assert tier.counts.refused == {"invalid_embedding": 1}
    assert not await bench.brought(tier, item), "removed"


# -- drop ------------------------------------------------------------------------------------------------


async def test_drop_by_key_salt_image_and_all(bench: Bench) -> None:
    tier = bench.tier()
    items = [item_of(1), item_of(1, salt="a"), item_of(2, salt="a"), item_of(2), item_of(3)]
    await bench.keep(tier, *items)

    async def left() -> list[bool]:
        return [await bench.brought(tier, item) for item in items]

    assert await left() == [True] * 5
    assert await drop(tier, Selection(tag=salt_tag("b"))) == 0
    assert await drop(tier, Selection(tag=salt_tag("a"))) == 2
    assert await left() == [True, False, False, True, True]
    assert await drop(tier, Selection(content=items[3].content)) == 1
    assert await left() == [True, False, False, False, True]
    assert await drop(tier, Selection(key=items[4].key.hex)) == 1
    assert await left() == [True, False, False, False, False]
    assert await drop(tier, Selection()) == 1
    assert await left() == [False] * 5
    await bench.keep(tier, items[1])
    assert await bench.brought(tier, items[1]), "stored again after the drop"


def patient(tier: StoredTier) -> None:
    """Give it time again: this machine may be busy."""
    tier._limits = replace(tier._limits, lookup_s=5.0, fetch_s=5.0)


class Gated:
    """A storage whose `store` waits at a gate; the rest is the real one's."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.reached, self.open = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def store(self, name: EntryName, header: bytes, payload: memoryview) -> None:
        self.reached.set()
        assert self.open.wait(30)
        self._storage.store(name, header, payload)


async def test_a_drop_during_an_offer_leaves_nothing(bench: Bench) -> None:
    gated = Gated(bench.make_storage(fingerprint=FINGERPRINT))
    tier = bench.tier(storage=gated)  # type: ignore[arg-type]
    with bench.committed(item_of(1)) as one, bench.committed(item_of(2)) as two:
        tier.offer(item_of(1), one)
        await asyncio.to_thread(gated.reached.wait, 30)
        tier.offer(item_of(2), two)  # waits in the queue
    dropping = asyncio.create_task(tier.drop(Selection(), deadline_s=20))
    await until(lambda: tier.slots._free == 3)
    gated.open.set()
    assert (await dropping).unfinished == 0
    await until(lambda: tier.offers.outcomes["dropped"] == 2)
    bench.cache.clear()
    for number in (1, 2):
        assert not await bench.brought(bench.tier(), item_of(number))


# -- bounds ----------------------------------------------------------------------------------------------


async def test_offers_that_wait_are_bounded_and_hold_leases(bench: Bench) -> None:
    gated = Gated(bench.make_storage(fingerprint=FINGERPRINT))
    tier = bench.tier(storage=gated, waiting_bytes=3 * NBYTES)  # type: ignore[arg-type]
    for number in range(100):
        with bench.committed(item_of(number % 8)) as lease:
            tier.offer(item_of(number % 8), lease)
    assert tier.offers.waiting == (3, 3 * NBYTES)
    held = bench.cache.statistics()
    assert held.leased_bytes + held.withdrawn_bytes == 3 * NBYTES
    assert tier.offers.outcomes["full"] >= 5
    gated.open.set()
    await until(lambda: tier.offers.outcomes["stored"] == 3)
    await bench.nothing_held()


class Stuck:
    """An entry whose reads wait at a gate, and the storage that finds it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.open, self.inside = threading.Event(), 0
        self.gate_look_ups = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def look_up(self, name: EntryName) -> OpenEntry | None:
        found = self._storage.look_up(name)
        if self.gate_look_ups:
            self._wait()
        return None if found is None else _StuckEntry(found, self)  # type: ignore[return-value]

    def _wait(self) -> None:
        self.inside += 1
        assert self.open.wait(30)


class _StuckEntry:
    def __init__(self, inner: OpenEntry, gate: Stuck) -> None:
        self._inner, self._gate = inner, gate

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def read(self, piece: memoryview, offset: int) -> int:
        self._gate._wait()
        return self._inner.read(piece, offset)


async def test_with_every_thread_stuck_it_is_absent_at_once_and_extents_wait_in_quarantine(
    bench: Bench,
) -> None:
    await bench.keep(bench.tier(), *map(item_of, range(6)))
    stuck = Stuck(bench.make_storage(fingerprint=FINGERPRINT))
    tier = bench.tier(storage=stuck, fetch_s=0.05, threads=2, failures=100, turn_s=3600)  # type: ignore[arg-type]
    fills = [tier.fill(item_of(number), bench.receiver.receive) for number in range(6)]
    async with asyncio.timeout(60):  # by no means the hour that a turn may take
        answers = await asyncio.gather(*fills, return_exceptions=True)
    assert sum(isinstance(answer, MmCacheError) for answer in answers) >= 2
    assert all(answer is None or isinstance(answer, MmCacheError) for answer in answers)
    assert tier.slots.stuck == 2
    assert bench.cache.statistics().quarantined == 2
    inside = stuck.inside
    async with asyncio.timeout(60):
        assert await tier.fill(item_of(0), bench.receiver.receive) is None
    assert (stuck.inside, tier.lookups["busy"] > 0) == (inside, True), "nothing more was begun"
    stuck.open.set()
    patient(tier)
    await until(lambda: bench.cache.statistics().quarantined == 0)
    await until(lambda: tier.slots.stuck == 0)
    assert await bench.brought(tier, item_of(0))


async def test_a_lookup_past_its_deadline_is_a_miss_and_three_open_the_breaker(bench: Bench) -> None:
    await bench.keep(bench.tier(), item_of(1))
    stuck = Stuck(bench.make_storage(fingerprint=FINGERPRINT))
    stuck.gate_look_ups = True
    tier = bench.tier(storage=stuck, lookup_s=0.02, threads=4)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(MmCacheError):
            await tier.fill(item_of(1), bench.receiver.receive)
    assert await tier.fill(item_of(1), bench.receiver.receive) is None
    assert tier.lookups == {"failed": 3, "passed_over": 1}
    stuck.gate_look_ups = False
    stuck.open.set()
    patient(tier)
    await until(lambda: tier.slots.stuck == 0)
    bench.clock.now += 11
    assert await bench.brought(tier, item_of(1)), "the probe closes it"


async def test_a_request_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    await bench.keep(bench.tier(), item_of(1))
    stuck = Stuck(bench.make_storage(fingerprint=FINGERPRINT))
    tier = bench.tier(storage=stuck)  # type: ignore[arg-type]
    filling = asyncio.create_task(tier.fill(item_of(1), bench.receiver.receive))
    await until(lambda: stuck.inside == 1)
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert bench.cache.statistics().quarantined == 1
    stuck.open.set()
    await bench.nothing_held()
    assert tier.lookups == {"unused": 1}


async def test_one_that_finds_no_room_is_no_failure_of_the_tier(bench: Bench) -> None:
    tier = bench.tier()
    await bench.keep(tier, item_of(1))
    full: list[Reservation] = [
        manager.reserve("other", manager.budget_bytes, owner="test")
        for manager in (bench.cache, bench.receiver._transit)
    ]
    with pytest.raises(MmCacheError):
        await tier.fill(item_of(1), bench.receiver.receive)
    assert (tier.lookups, tier.breaker.opened) == ({"unused": 1}, 0)
    for reservation in full:
        reservation.abandon()
    assert await bench.brought(tier, item_of(1))


async def test_what_another_tier_seals_wrong_is_no_wrong_answer(bench: Bench) -> None:
    """A header that is authentic and announces other bytes than lie there."""
    tier, item = bench.tier(), item_of(1)
    with bench.committed(item) as lease:
        payload = bytearray(lease.tensor.numpy().tobytes())
        header = tier._rules.sealed(name_of(item), "image", item.content, lease, memoryview(payload))
    assert header is not None
    payload[NBYTES // 2] ^= 1
    await until(lambda: tier._storage.writes)
    tier._storage.store(name_of(item), header, memoryview(payload))
    with pytest.raises(RefusedEntryError):
        await bench.brought(bench.tier(), item)


async def test_every_counter_is_there_from_the_start(bench: Bench) -> None:
    samples = [sample for metric in bench.tier().collect() for sample in metric.samples]
    labels = {(sample.name, *sample.labels.values()) for sample in samples}
    tier = bench.tiers[0].name
    assert ("trtllm_mm_cache_tier_lookups_total", tier, "hit") in labels
    assert ("trtllm_mm_cache_tier_refused_total", tier, "foreign_secret") in labels
    assert ("trtllm_mm_cache_tier_offers_total", tier, "full") in labels
