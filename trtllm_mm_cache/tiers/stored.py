"""A tier that keeps what it is offered: the same policy and the same failures over any `Storage`.

    may have it?   known without input or output, where the storage knows: most misses end here
    look up        the header, within 50 ms; believed when its seal fits
    receive        room in the arena, then the payload straight into it, sealed, finite
    offer          at its second use, behind the commit, by a thread of its own

Any failure is a miss here, within the deadline; three in a row, and the tier is passed over for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidEmbeddingError, MmCacheError
from trtllm_mm_cache.observability.metrics import Step
from trtllm_mm_cache.tiers.base import TierDropped, Wanted, WantedItem
from trtllm_mm_cache.tiers.breaker import CircuitBreakers
from trtllm_mm_cache.tiers.format import EntryName, RefusedEntryError
from trtllm_mm_cache.tiers.limits import TierLimits
from trtllm_mm_cache.tiers.metrics import Lookup, TierCounts, tier_metrics
from trtllm_mm_cache.tiers.offers import Offer, Offers, Outcome, Sink
from trtllm_mm_cache.tiers.payload import PayloadReader, StoredEmbedding, memory_at
from trtllm_mm_cache.tiers.rules import EntryRules
from trtllm_mm_cache.tiers.slots import NoSlotError, Slots
from trtllm_mm_cache.tiers.storage import OpenEntry, Storage, StorageError

_ONLY = 0  # the breaker's one instance


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
        self._reader = PayloadReader(self.name, self.slots, limits, rules.sealer, self._reading)
        sink = Sink(self._put, storage.remove, lambda: storage.tidy(rules.judge))
        self.offers = Offers(self.name, sink, limits, clock)
        self.counts = TierCounts()

    @property
    def lookups(self) -> Counter[Lookup]:
        """Lookups by how they ended."""
        return self.counts.lookups

    # -- reading -------------------------------------------------------------------------------------

    async def fill(
        self, item: WantedItem, receive: Callable[[WantedItem, StoredEmbedding], Awaitable[Lease]]
    ) -> Lease | None:
        """See `Tier.fill`. A refused entry is removed, so that the next offer stores the key anew."""
        name = EntryName(item.key.hex, item.scope.tag)
        if not item.retained or not self._storage.may_have(name.key):
            self.counts.lookups["absent"] += 1
            return None
        if not self.breaker.admits(_ONLY):
            self.counts.lookups["passed_over"] += 1
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
            self.counts.lookups[outcome] += 1
        self.counts.read_bytes += lease.nbytes
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
        return StoredEmbedding(self._reader, opened, header)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self.breaker.calling(_ONLY), self._steps["read"].time():
            yield

    async def _refuse(self, name: EntryName, error: MmCacheError) -> None:
        self.counts.refused[error.reason if isinstance(error, RefusedEntryError) else error.code] += 1
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
        payload = memory_at(offer.lease.address, offer.lease.nbytes)
        with self._steps["store"].time():
            header = self._rules.sealed(offer.name, offer.kind, offer.content, offer.lease, payload)
            if header is None:
                return "unfit"
            self._storage.store(offer.name, header, payload)
        self.counts.written_bytes += offer.lease.nbytes
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
            self.counts.drops_failed += 1
            raise StorageError(
                f"tier {self.name} is stuck and could not drop: what it holds may come back; drop again"
            ) from None
        except MmCacheError as error:
            self.counts.drops_failed += 1
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
        passed_over = self.breaker.states().get(_ONLY, "closed") != "closed"
        yield from tier_metrics(
            self.name, self.counts, self.offers, self._storage.contents(), self.slots.stuck, passed_over
        )


def _close_late(outcome: Future[OpenEntry | None]) -> None:
    if outcome.exception() is None and (opened := outcome.result()) is not None:
        opened.close()
