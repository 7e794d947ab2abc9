"""Where a missing embedding comes from in an aggregated worker: the engine's own vision tower.

A miss claims its key, has its image prepared and reserves room, and goes to the engine in the place of a
lease: `filling.py` tells how it becomes an entry, `fill_check.py` what is checked before. Requests for a key
that is claimed wait, and get leases.

A request that has claimed a key never begins to wait for another: that one's request might wait for this one,
and both for ever. It has the image encoded without keeping it. (In a circle of requests that wait for each
other's claims, one at least would have claimed before it began to wait.)

What finds no room, may not be kept, or has waited too long is encoded and not kept either: no request fails
for want of room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.arena.marks import MarkBoard
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import EncodeItem
from trtllm_mm_cache.engines.own_tower import OwnTowerGenerator, PreparedItem
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EncodeFailedError,
    EntryTooLargeError,
    LoadAbortedError,
    MmCacheError,
)
from trtllm_mm_cache.media import decode_image
from trtllm_mm_cache.observability.metrics import Step, counter
from trtllm_mm_cache.runtime.admission import Admitted
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.threads import in_thread
from trtllm_mm_cache.tiers.base import Found, Loading, MissingItem, TierDropped
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.claims import Claim, Claims, Landing
from trtllm_mm_cache.tiers.fill_check import FillChecks
from trtllm_mm_cache.tiers.filling import Extent, Filling, HeldFilling
from trtllm_mm_cache.tiers.intake import Intake

_THREADS = 2
_PREPARED_AT_A_TIME = 4
_OWNER = "own tower"


class OwnTower(Collector):
    """`Misses` of one aggregated PD worker. For use from one event loop.

    `cache` retains, or, with capacity 0, has no room for anything. `uncached` counts embeddings that were to
    be made without entering the cache.
    """

    def __init__(
        self,
        cache: MultimodalEmbeddingCacheManager,
        what_if: WhatIf | None,
        generator: OwnTowerGenerator,
        settings: PdSettings,
        registry: CollectorRegistry,
        stored: StoredTiers | None = None,
    ) -> None:
        self._stored = stored or StoredTiers()
        self._cache = cache
        self._intake = Intake(generator.check_embedding, what_if, registry)
        self._generator = generator
        self._limits = settings.images
        self._wait_s = settings.encode_timeout_s
        self._marks = MarkBoard()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="own-tower")
        self._turns = asyncio.Semaphore(_PREPARED_AT_A_TIME)
        self._preparing = Step.new(registry, "preprocess", "Decoding and preprocessing one image.")
        self.checks = FillChecks(self._intake, self._threads, self.used)
        self.claims = Claims()
        self.uncached = 0
        registry.register(self)

    @property
    def flights(self) -> Claims:
        """See `Misses.flights`."""
        return self.claims

    async def find(self, item: MissingItem, loading: Loading) -> tuple[Lease | HeldFilling, bool]:
        """See `Misses.find`. Raises `RequestError` for what is wrong with the item."""
        prepared = None
        while item.retained:
            claim = self.claims.get(item.key.hex)
            if claim is None:
                return await self._claimed(item, prepared, loading), False
            if item.filling:
                prepared = claim.prepared  # it may be this request's own
                break
            item.release_media()
            landing = await self._wait(claim)
            if isinstance(landing, Lease):
                self.used(item, landing)
                return landing, True
            item.media, prepared = claim.media, claim.prepared
            if landing == "alone":
                break
            if self._cache.peek(item.key.hex) and (lease := self._cache.lease(item.key.hex)) is not None:
                return lease, True
        with ExitStack() as stack:
            prepared = await self._prepared(item, prepared, stack.enter_context(loading(item)))
            return self._filling(item, prepared, None, stack.pop_all()), False

    def used(self, item: MissingItem, lease: Lease) -> None:
        """See `Misses.used`."""
        self._stored.offer(item, lease)

    async def drop(self, selection: Selection, *, deadline_s: float) -> TierDropped:
        """See `Misses.drop`."""
        return await self._stored.drop(selection, deadline_s=deadline_s)

    def check_can_fit(self, needs: Mapping[str, int], *, retained: bool) -> None:
        """See `Misses.check_can_fit`: what finds no room is served without it."""

    async def close(self) -> None:
        """See `Misses.close`."""
        self.claims.close(LoadAbortedError("this worker is shutting down; retry on another"))
        await self.checks.close()
        await self._stored.close()
        await asyncio.to_thread(self._threads.shutdown)

    def collect(self) -> Iterable[Metric]:
        """Yield what was encoded, and what of it did not enter the cache."""
        yield counter(
            "encodes", "Images that went through the engine's vision tower.", self._generator.encodes
        )
        yield counter("uncached", "Embeddings served without entering the cache.", self.uncached)
        yield counter(
            "refused_embeddings", "Embeddings that were found wrong and not kept.", self.checks.refused
        )

    async def _wait(self, claim: Claim) -> Landing:
        try:
            async with asyncio.timeout(self._wait_s):
                return await claim.wait()
        except TimeoutError:
            return "alone"

    async def _claimed(
        self, item: MissingItem, prepared: PreparedItem | None, loading: Loading
    ) -> Lease | HeldFilling:
        claim = self.claims.start(item.key.hex, item.media)
        item.filling.add(item.key.hex)
        try:
            with ExitStack() as stack:
                admitted = stack.enter_context(loading(item))
                if (lease := await self._stored.load(item, self._receive)) is not None:
                    item.filling.discard(item.key.hex)
                    claim.land(lease)
                    return lease
                claim.prepared = await self._prepared(item, prepared, admitted)
                claim.media = b""
                extent = await self._reserved(item, claim.prepared, claim)
                return self._filling(item, claim.prepared, extent, stack.pop_all())
        except MmCacheError as error:
            claim.fail(error)
            raise
        except BaseException:
            claim.leave("again")
            raise

    async def _prepared(
        self, item: MissingItem, prepared: PreparedItem | None, admitted: Admitted
    ) -> PreparedItem:
        """Return the image as the tower takes it, and count that in the place of the file."""
        if prepared is None:
            with self._preparing.time():
                prepared = await self._prepare(item)
        item.release_media()
        admitted.shrink(admitted.nbytes)
        admitted.grow(prepared.nbytes)
        item.needs[item.key.hex] = prepared.shape.nbytes
        return prepared

    async def _prepare(self, item: MissingItem) -> PreparedItem:
        loop, description = asyncio.get_running_loop(), item.description
        async with self._turns:
            try:
                decode = partial(decode_image, item.media, self._limits)
                image = await loop.run_in_executor(self._threads, decode)
                return await self._generator.prepare(
                    EncodeItem(image, description.processor_kwargs, description.variant)
                )
            except MmCacheError:
                raise
            except Exception as error:
                raise EncodeFailedError(
                    "this image could not be prepared for the vision tower; see the PD worker's log"
                ) from error

    async def _reserved(self, item: MissingItem, prepared: PreparedItem, claim: Claim) -> Extent | None:
        """Return room for the embedding, or None where there is none: then whoever waits is told."""
        mark = self._marks.open()
        try:
            if mark is not None:
                with self._intake.reserve_step.time():
                    reservation = await self._make_room(item, prepared.shape.nbytes)
                return Extent(reservation, mark, claim)
        except BaseException as error:
            if mark is not None:
                mark.close()
            if not isinstance(error, (ArenaFullError, EntryTooLargeError)):
                raise
        claim.leave("alone")
        return None

    async def _receive(self, item: MissingItem, found: Found) -> Lease:
        """Take what a tier has found into the arena. What finds no room there is encoded."""
        return await self._intake.take(item, found, self._make_room)

    async def _make_room(self, item: MissingItem, nbytes: int) -> Reservation:
        key, tag, content = item.key.hex, item.scope.tag, item.content
        with suppress(ArenaFullError, EntryTooLargeError):
            at_once = self._cache.reserve_at_once(key, nbytes, owner=_OWNER, tag=tag, content=content)
            if at_once is not None:
                return at_once
        reserve = partial(self._cache.reserve, key, nbytes, owner=_OWNER, tag=tag, content=content)
        # In a thread: making room may move other entries, which copies megabytes.
        return await in_thread(reserve, undo=Reservation.abandon)

    def _filling(
        self, item: MissingItem, prepared: PreparedItem, extent: Extent | None, undertaking: ExitStack
    ) -> HeldFilling:
        self.uncached += extent is None
        return Filling(item, prepared, extent, undertaking, self.checks.start).hold()
