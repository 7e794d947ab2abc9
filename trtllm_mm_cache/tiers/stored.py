"""A tier that keeps what it is offered: the same policy and the same failures over any `Storage`.

    may have it?   known without input or output, where the storage knows: most misses end here
    look up        the header, within 50 ms; believed when its seal fits
    receive        room in the arena, then the payload straight into it, sealed, finite
    offer          at its second use, behind the commit, by a thread of its own

Any failure is a miss here, within the deadline; three in a row, and the tier is passed over for a while.
"""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import Lease, Reservation
from trtllm_mm_cache.cache.scope import Scope, Selection
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidEmbeddingError, MmCacheError
from trtllm_mm_cache.observability.metrics import Step, samples
from trtllm_mm_cache.settings import MB
from trtllm_mm_cache.tiers.base import TierDropped
from trtllm_mm_cache.tiers.breaker import CircuitBreakers
from trtllm_mm_cache.tiers.format import HEADER_BYTES, REFUSALS, EntryName, Header, RefusedEntryError, Sealer
from trtllm_mm_cache.tiers.offers import OUTCOMES, Offer, Offers, Outcome
from trtllm_mm_cache.tiers.rules import EntryRules
from trtllm_mm_cache.tiers.slots import NoSlotError, Slots
from trtllm_mm_cache.tiers.storage import OpenEntry, Storage, StorageError
from trtllm_mm_cache.transfer.finite import PIECE_BYTES, is_finite

logger = logging.getLogger(__name__)

Lookup = Literal["hit", "absent", "refused", "failed", "busy", "passed_over", "unused"]
LOOKUPS: Final[tuple[Lookup, ...]] = get_args(Lookup)
"""How a lookup in a tier ended: committed; not there; there and wrong; error or deadline; no thread free;
not asked, after failures in a row; found and not taken, for there was no room or the request was over."""

_ONLY = 0  # the breaker's one instance
_WAITING_SHARE = 4  # offers that wait pin at most a quarter of an arena


class Wanted(Protocol):
    """What a tier needs to know of an item: of a PD worker's and of an encode worker's."""

    @property
    def key(self) -> EmbeddingKey:
        """The embedding's key."""
        ...

    @property
    def kind(self) -> str:
        """What the item is."""
        ...

    @property
    def content(self) -> bytes | None:
        """The digest of its media, where it is known."""
        ...

    @property
    def scope(self) -> Scope:
        """Whose it is."""
        ...

    @property
    def retained(self) -> bool:
        """Whether its embedding may be stored, as things are now."""
        ...


Item = TypeVar("Item", bound=Wanted)


@dataclass(frozen=True)
class TierLimits:
    """How long a tier may take, and when it is offered what.

    A lookup has `lookup_s`, a read `fetch_s` and the time of its bytes at `bytes_per_s`. An item whose turn
    at one of `threads` has not come after `turn_s` is a miss. After `failures` in a row the tier is passed
    over, and tried again every `retry_s`. Stored is what is used `at_use` times; what waits to be stored pins
    at most `waiting_bytes` of the arena.
    """

    lookup_s: float = 0.05
    fetch_s: float = 0.1
    bytes_per_s: float = 200 * MB
    turn_s: float = 0.5
    threads: int = 4
    failures: int = 3
    retry_s: float = 10.0
    at_use: int = 2
    waiting_bytes: int = 256 * MB

    @classmethod
    def waiting_for(cls, arenas: Iterable[int]) -> int:
        """Return `waiting_bytes` for a worker with `arenas` of these sizes."""
        return min(cls.waiting_bytes, *(size // _WAITING_SHARE for size in arenas))


class StoredTier(Collector):
    """`Tier` over a storage. For use from one event loop; owns the storage.

    `seconds` has the labels `tier` and `step`; several tiers of a process share it. `clock` counts seconds,
    for the breaker and the touches.
    """

    def __init__(
        self,
        storage: Storage,
        rules: EntryRules,
        limits: TierLimits,
        seconds: Step,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = storage.name
        self._storage = storage
        self._rules = rules
        self._limits = limits
        self._steps = {
            step: seconds.labels(tier=self.name, step=step) for step in ("lookup", "read", "store")
        }
        self.breaker = CircuitBreakers(
            failures=limits.failures,
            retry_s=limits.retry_s,
            clock=clock,
            describe=lambda _: f"tier {self.name}",
        )
        self.slots = Slots(self.name, limits.threads, turn_s=limits.turn_s)
        self.offers = Offers(
            self.name,
            self._put,
            storage.remove,
            lambda: storage.tidy(rules.judge),
            at_use=limits.at_use,
            max_bytes=limits.waiting_bytes,
            clock=clock,
        )
        self.lookups: Counter[Lookup] = Counter()
        self.refused: Counter[str] = Counter()
        self.read_bytes = self.written_bytes = self.drops_failed = 0

    # -- reading -------------------------------------------------------------------------------------

    async def fill(
        self, item: Item, receive: Callable[[Item, StoredEmbedding], Awaitable[Lease]]
    ) -> Lease | None:
        """See `Tier.fill`. A refused entry is removed, so that the next offer stores the key anew."""
        name = EntryName(item.key.hex, item.scope.tag)
        if not item.retained or not self._storage.may_have(name.key):
            self.lookups["absent"] += 1
            return None
        if not self.breaker.admits(_ONLY):
            self.lookups["passed_over"] += 1
            return None
        outcome: Lookup = "unused"
        try:
            with self.breaker.calling(_ONLY):
                found = await self._look_up(name)
            if found is None:
                outcome = "absent"
                return None
            lease = await receive(item, found)
            outcome = "hit"
        except NoSlotError:
            outcome = "busy"
            return None
        except StorageError:
            outcome = "failed"
            raise
        except (RefusedEntryError, InvalidEmbeddingError, EmbeddingMismatchError) as error:
            outcome = "refused"
            await self._refuse(name, error)
            raise
        finally:
            self.lookups[outcome] += 1
        self.read_bytes += lease.nbytes
        self.offers.holds(name.key)
        return lease

    async def _look_up(self, name: EntryName) -> StoredEmbedding | None:
        with self._steps["lookup"].time():
            opened = await self.slots.run(
                partial(self._storage.look_up, name), deadline_s=self._limits.lookup_s, late=_close_late
            )
        if opened is None:
            self.offers.lacks(name.key)
            return None
        try:
            header = self._rules.admitted(opened.header, opened.size, name)
        except BaseException:
            opened.close()
            raise
        return StoredEmbedding(self, opened, header)

    async def read(
        self, opened: OpenEntry, header: Header, reservation: Reservation, *, finite: bool
    ) -> None:
        """Fill `reservation` with the payload of an entry, which is closed then: see `Found.read_into`."""
        if reservation.nbytes != header.nbytes:
            opened.close()
            reservation.abandon()
            raise EmbeddingMismatchError(
                f"{reservation.nbytes} bytes were reserved for an entry of {header.nbytes}"
            )
        left = False

        def leave() -> None:
            nonlocal left
            left = True
            reservation.quarantine()
            logger.warning(
                "tier %s: a read of %d bytes goes on: its extent is in quarantine", self.name, header.nbytes
            )

        def late(_: Future[None]) -> None:
            opened.close()
            reservation.settle()

        try:
            work = partial(
                _read_checked, opened, header, reservation.address, self._rules.sealer, finite=finite
            )
            seconds = self._limits.fetch_s + header.nbytes / self._limits.bytes_per_s
            with self.breaker.calling(_ONLY), self._steps["read"].time():
                await self.slots.run(work, deadline_s=seconds, leave=leave, late=late)
        except BaseException:
            if not left:
                opened.close()
                reservation.abandon()
            raise
        opened.close()

    async def _refuse(self, name: EntryName, error: MmCacheError) -> None:
        self.refused[error.reason if isinstance(error, RefusedEntryError) else error.code] += 1
        self.offers.lacks(name.key)
        with suppress(NoSlotError, StorageError):
            await self.slots.run(partial(self._storage.remove, name), deadline_s=self._limits.lookup_s)

    # -- writing -------------------------------------------------------------------------------------

    def offer(self, item: Wanted, lease: Lease) -> None:
        """Note one use of the embedding of `item`, which `lease` holds and which did not come from here now.

        It is stored, some time soon, when that is due; the lease stays the caller's. Never waits and never
        raises. Nothing is kept of what is not `retained`.
        """
        if item.retained:
            content = item.content or lease.content
            self.offers.used(EntryName(item.key.hex, item.scope.tag), item.kind, content, lease)

    def _put(self, offer: Offer) -> Outcome:
        if self._storage.touch(offer.name):
            return "present"
        if not self._storage.writes:
            return "elsewhere"
        payload = _memory(offer.lease.address, offer.lease.nbytes)
        with self._steps["store"].time():
            header = self._rules.sealed(offer.name, offer.kind, offer.content, offer.lease, payload)
            if header is None:
                return "unfit"
            self._storage.store(offer.name, header, payload)
        self.written_bytes += offer.lease.nbytes
        return "stored"

    # -- dropping and the end ------------------------------------------------------------------------

    async def drop(self, selection: Selection, *, deadline_s: float) -> TierDropped:
        """Remove what is selected, also what is being stored. Raises `StorageError` where that failed."""
        running = self.offers.drop(selection)

        def work() -> TierDropped:
            ended = self.offers.wait_ended(running, deadline_s / 2)
            dropped = self._storage.drop(selection, self._rules.authentic)
            return TierDropped(dropped.entries, dropped.nbytes, 0 if ended else len(running))

        try:
            return await self.slots.run(work, deadline_s=deadline_s)
        except NoSlotError:
            self.drops_failed += 1
            raise StorageError(
                f"tier {self.name} is stuck and could not drop: what it holds may come back; drop again"
            ) from None
        except MmCacheError as error:
            self.drops_failed += 1
            raise StorageError(
                f"tier {self.name} could not drop ({error.message}): what it holds may come back; drop again"
            ) from error

    async def close(self) -> None:
        """Stop storing; threads that are stuck are left behind."""
        await asyncio.to_thread(self.offers.close)
        self.slots.close()
        self._storage.close()

    # -- counting ------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Yield lookups, offers and what lies there. Any thread."""
        waiting, waiting_bytes = self.offers.waiting
        contents, outcomes = self._storage.contents(), self.offers.outcomes
        refusals = {reason: self.refused[reason] for reason in (*REFUSALS, *sorted(self.refused))}
        counters = (
            ("tier_lookups", "Lookups in a tier, by how they ended.", "outcome", _of(self.lookups, LOOKUPS)),
            ("tier_refused", "Entries refused and removed, by reason.", "reason", refusals),
            ("tier_offers", "Embeddings offered, by how that ended.", "outcome", _of(outcomes, OUTCOMES)),
            (
                "tier_bytes",
                "Bytes of embeddings that a tier brought (read) and took (written).",
                "direction",
                {"read": self.read_bytes, "written": self.written_bytes},
            ),
            (
                "tier_errors",
                "Calls of a tier that failed, by what was called.",
                "call",
                {
                    "read": self.lookups["failed"],
                    "store": outcomes["failed"],
                    "drop": self.drops_failed,
                    "tidy": self.offers.errors,
                },
            ),
        )
        for name, text, label, counts in counters:
            rows = [({"tier": self.name, label: each}, count) for each, count in counts.items()]
            yield samples(CounterMetricFamily, name, text, rows)
        threads_help = "Threads of a tier that are past the deadline of their call."
        for name, text, value in (
            ("tier_waiting_offers", "Embeddings that wait to be stored in a tier.", waiting),
            ("tier_waiting_bytes", "Their bytes, which are held in the arena.", waiting_bytes),
            ("tier_stuck_threads", threads_help, self.slots.stuck),
            ("tier_passed_over", "1 while a tier is passed over after failures.", self._is_passed_over()),
            ("tier_entries", "Entries that lie in a tier.", contents.entries),
            ("tier_stored_bytes", "Their bytes.", contents.nbytes),
            ("tier_capacity_bytes", "Most bytes that may lie in a tier.", contents.capacity),
        ):
            values = [] if value is None else [({"tier": self.name}, float(value))]
            yield samples(GaugeMetricFamily, name, text, values)

    def _is_passed_over(self) -> bool:
        return self.breaker.states().get(_ONLY, "closed") != "closed"


class StoredEmbedding:
    """`Found`: an entry of a tier whose header is authentic."""

    def __init__(self, tier: StoredTier, opened: OpenEntry, header: Header) -> None:
        self.nbytes = header.nbytes
        self.dtype = header.dtype
        self.shape = header.shape
        self.metadata = header.metadata
        self.content = header.content
        self._tier = tier
        self._opened = opened
        self._header = header

    async def read_into(self, reservation: Reservation, *, finite: bool) -> None:
        """See `Found.read_into`."""
        await self._tier.read(self._opened, self._header, reservation, finite=finite)

    def release(self) -> None:
        """See `Found.release`."""
        self._opened.close()


def _read_checked(opened: OpenEntry, header: Header, address: int, sealer: Sealer, *, finite: bool) -> None:
    """Read and check piece by piece: every byte comes from memory once."""
    memory = _memory(address, header.nbytes)
    hasher, all_finite = sealer.payload_hasher(), True
    for start in range(0, header.nbytes, PIECE_BYTES):
        piece = memory[start : start + PIECE_BYTES]
        if opened.read(piece, HEADER_BYTES + start) != len(piece):
            raise RefusedEntryError("an entry ended before its last byte", reason="truncated")
        hasher.update(piece)
        all_finite = all_finite and (not finite or is_finite(piece, header.dtype))
    if not hmac.compare_digest(hasher.digest(), header.payload_seal):
        raise RefusedEntryError("the bytes of an entry are not those that were sealed", reason="damaged")
    if not all_finite:
        raise InvalidEmbeddingError("the embedding holds NaN or infinite values")


def _of(counts: Mapping[Any, int], names: Iterable[str]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in names}


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _close_late(outcome: Future[OpenEntry | None]) -> None:
    if outcome.exception() is None and (opened := outcome.result()) is not None:
        opened.close()
