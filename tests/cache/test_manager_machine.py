"""Random life of a cache: every byte is compared, and the accounting checked, after each step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from trtllm_mm_cache.cache.entry import EmbeddingMetadata, EntryState
from trtllm_mm_cache.cache.eviction.base import make_policy
from trtllm_mm_cache.cache.manager import (
    CachedEmbedding,
    Lease,
    MultimodalEmbeddingCacheManager,
    Reservation,
)
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import ArenaFullError, EmbeddingMismatchError, EntryTooLargeError

KEYS = st.sampled_from("abcdefghijkl")
TAGS = st.sampled_from([None, b"one", b"two"])
# In thousandths of the capacity, with some bytes more: mostly small enough that several fit.
SIZES = st.tuples(
    st.one_of(st.integers(0, 1001), st.integers(0, 350), st.sampled_from([60, 125, 250])), st.integers(0, 70)
)


@dataclass(eq=False)
class Held:
    """Something that pins bytes, and the bytes it must show for as long as it is kept."""

    content: torch.Tensor
    lease: Lease | None = None
    alias: torch.Tensor | None = None

    def shown(self) -> torch.Tensor:
        if self.alias is not None:
            return self.alias
        assert self.lease is not None
        return self.lease.tensor

    def release(self) -> None:
        self.alias = None
        if self.lease is not None:
            self.lease.release()


@dataclass(eq=False)
class Open:
    """A reservation in the machine's hands and what has been written into it."""

    reservation: Reservation
    content: torch.Tensor
    tag: bytes | None
    quarantined: bool = field(default=False)


class CacheMachine(RuleBasedStateMachine):
    """`visible` is the model: key to content. Held things are checked for ever, evicted or not."""

    held = Bundle("held")
    open = Bundle("open")

    # From 1 MiB on the region has no slack: there holes run short and entries move.
    @initialize(
        capacity=st.sampled_from([2048, 1024 * 1024]),
        transfer=st.sampled_from([False] * 3 + [True]),
        policy=st.sampled_from(["lru", "s3fifo"]),
    )
    def start(self, capacity: int, transfer: bool, policy: str) -> None:
        chosen = make_policy(policy, capacity)
        if transfer:
            self.manager = MultimodalEmbeddingCacheManager(0, transfer_bytes=capacity, policy=chosen)
        else:
            self.manager = MultimodalEmbeddingCacheManager(capacity, policy=chosen)
        self.lru = policy == "lru"
        self.budget = capacity
        self.transfer = transfer
        self.written: dict[str, torch.Tensor] = {}
        self.tags: dict[str, bytes | None] = {}
        self.alive: list[Held] = []
        self.reservations: list[Open] = []
        self.serial = 0

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for opened in self.reservations:
            opened.reservation.settle() if opened.quarantined else opened.reservation.abandon()
        for holder in self.alive:
            holder.release()
        snapshot = self.manager.statistics()
        assert snapshot.leased_entries == snapshot.withdrawn_entries == 0
        assert snapshot.reservations == snapshot.quarantined == snapshot.forgotten == 0
        self.manager.clear()
        assert self.manager.statistics().arena.free_bytes == self.manager.arena.capacity_bytes
        self.manager.close()

    def content(self, nbytes: int) -> torch.Tensor:
        self.serial += 1
        generator = torch.Generator().manual_seed(self.serial)
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    def nbytes(self, size: tuple[int, int]) -> int:
        return 0 if size == (0, 0) else self.budget * size[0] // 1000 + size[1]

    def keep(self, held: Held) -> Held:
        self.alive.append(held)
        return held

    # -- reservations

    @rule(target=open, key=KEYS, size=SIZES, tag=TAGS)
    def reserve(self, key: str, size: tuple[int, int], tag: bytes | None) -> object:
        nbytes = self.nbytes(size)
        before = self.manager.statistics()
        keys = self.manager.keys()
        try:
            reservation = self.manager.reserve(key, nbytes, owner="machine", tag=tag)
        except EntryTooLargeError:
            assert nbytes > self.budget
        except ArenaFullError:
            assert nbytes <= self.budget
            assert self.manager.keys() == keys, "a refusal evicts nothing"
            idle = before.current_bytes - before.leased_bytes
            held = before.arena.used_bytes - idle
            pinned = (
                before.leased_entries + before.withdrawn_entries + before.reservations + before.quarantined
            )
            assert held + nbytes > self.budget or pinned, "refused although everything could be evicted"
        else:
            content = self.content(nbytes)
            reservation.view.copy_(content)
            opened = Open(reservation, content, tag)
            self.reservations.append(opened)
            return opened
        return multiple()

    @rule(target=held, opened=consumes(open), retain=st.booleans())
    def commit(self, opened: Open, retain: bool) -> object:
        if opened.quarantined:
            opened.reservation.settle()
            self.reservations.remove(opened)
            return multiple()
        nbytes = opened.reservation.nbytes
        with pytest.raises(EmbeddingMismatchError):
            opened.reservation.commit(dtype=torch.uint8, shape=(nbytes + 1,))
        keys = self.manager.keys()
        lease = opened.reservation.commit(
            dtype=torch.uint8, shape=(1, nbytes), metadata=EmbeddingMetadata(checksum=nbytes), retain=retain
        )
        self.reservations.remove(opened)
        if retain:
            self.written[lease.key], self.tags[lease.key] = opened.content, opened.tag
            assert self.manager.peek(lease.key)
        else:
            assert self.manager.keys() == keys
        return self.keep(Held(opened.content.reshape(1, -1), lease=lease))

    @rule(opened=consumes(open))
    def abandon(self, opened: Open) -> None:
        opened.reservation.settle() if opened.quarantined else opened.reservation.abandon()
        self.reservations.remove(opened)
        assert opened.reservation.state is EntryState.FREED

    @rule(opened=open)
    def quarantine(self, opened: Open) -> None:
        if not opened.quarantined:
            opened.reservation.quarantine()
            opened.quarantined = True

    # -- look-ups and holders

    @rule(target=held, key=KEYS, alias=st.sampled_from(["lease", "tensor", "slice", "inference", "numpy"]))
    def look_up(self, key: str, alias: str) -> object:
        visible = self.manager.peek(key)
        found = self.manager.lease(key)
        assert (found is not None) == visible
        if found is None:
            return multiple()
        content = self.written[key].reshape(found.tensor.shape)
        if alias == "lease":
            return self.keep(Held(content, lease=found))
        found.release()
        entry = self.manager.get(key)
        if entry is None:
            assert self.transfer
            return multiple()
        tensor = entry.tensor
        if alias == "slice":
            return self.keep(Held(content[..., 3:], alias=tensor[..., 3:]))
        if alias == "numpy":
            return self.keep(Held(content, alias=torch.from_numpy(tensor.numpy())))
        if alias == "inference":
            with torch.inference_mode():
                return self.keep(Held(content[..., ::2], alias=tensor[..., ::2]))
        return self.keep(Held(content, alias=tensor))

    @rule(target=held, original=held)
    def clone(self, original: Held) -> object:
        if original.lease is None or original.lease.released:
            return multiple()
        return self.keep(Held(original.content, lease=original.lease.clone()))

    @rule(holder=consumes(held))
    def release(self, holder: Held) -> None:
        if holder in self.alive:
            self.alive.remove(holder)
        holder.release()

    # -- the other face

    @precondition(lambda self: not self.transfer)
    @rule(calls=st.dictionaries(KEYS, SIZES, min_size=1, max_size=10))
    def set(self, calls: dict[str, tuple[int, int]]) -> None:
        for key, size in calls.items():
            self.set_one(key, self.content(self.nbytes(size)))

    def set_one(self, key: str, content: torch.Tensor) -> None:
        keys = self.manager.keys()
        stored, added, removed = self.manager.set_with_delta(key, CachedEmbedding(content))
        assert set(self.manager.keys()) == (set(keys) | set(added)) - set(removed)
        if stored:
            self.written[key], self.tags[key] = content, None
            assert self.manager.keys()[-1] == key or not self.lru
            assert added == ([] if key in keys else [key])
        else:
            assert self.manager.keys() == keys

    @precondition(lambda self: not self.transfer)
    @rule(key=KEYS, size=SIZES)
    def make_room(self, key: str, size: tuple[int, int]) -> None:
        keys = self.manager.keys()
        admitted, removed = self.manager.make_room_for(key, self.nbytes(size))
        gone = {*removed, key} if admitted else set()
        left = [name for name in keys if name not in gone]
        if self.lru:
            assert self.manager.keys() == left
        assert set(self.manager.keys()) == set(left)

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        assert self.manager.peek(key) == self.manager.drop(key)
        assert not self.manager.peek(key)

    @rule(tag=TAGS)
    def drop_tagged(self, tag: bytes | None) -> None:
        keys = self.manager.keys()
        gone = [key for key in keys if tag is None or self.tags[key] == tag]
        nbytes = sum(self.written[key].nbytes for key in gone)
        dropped = self.manager.drop_selected(Selection(tag=tag))
        assert (sorted(dropped.keys), dropped.nbytes) == (sorted(gone), nbytes)
        assert self.manager.keys() == [key for key in keys if key not in gone]

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        for holder in self.alive:
            assert holder.shown().equal(holder.content), "a view that was handed out changed"
        for opened in self.reservations:
            assert opened.reservation.view.equal(opened.content)
        for key in self.manager.keys():
            entry = self.manager.get(key)
            if entry is not None:
                assert entry.tensor.flatten().equal(self.written[key])
            del entry
        snapshot = self.manager.statistics()
        assert snapshot.arena.used_bytes <= self.budget
        assert snapshot.reservations + snapshot.quarantined == len(self.reservations)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
