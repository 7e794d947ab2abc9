"""From an item's bytes to a lease on its embedding in the worker's own arena.

    lookup       in the arena, which is a second level of cache for all PD workers; else one flight per key:
    tiers        a disk or a store that kept it, where there are some; else
    make         by the vision tower (`maker.py`)
    commit

It knows nothing of who asks: `server.py` exports what it makes to PD workers.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.scope import Dropped, Scope, Selection
from trtllm_mm_cache.encode.maker import EncodeJob, Maker, Stored
from trtllm_mm_cache.engines.base import VisionEncoder
from trtllm_mm_cache.errors import EncodeOverloadedError, MmCacheError
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.observability.cache_metrics import CacheCollector, FlightCollector
from trtllm_mm_cache.runtime.admission import Admission
from trtllm_mm_cache.runtime.drops import Drops, DropWatch
from trtllm_mm_cache.settings import MB, EncodeSettings
from trtllm_mm_cache.threads import in_thread
from trtllm_mm_cache.tiers.base import TierDropped
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.intake import announced_dtype
from trtllm_mm_cache.tiers.payload import StoredEmbedding

_DROP_S = 3600.0  # more than a drop may take; where it fails, until the next one
_FORGET_S = 1.0

Origin = Literal["encoded", "joined", "cached"]
"""Where an embedding came from: the tower, a flight of another call, or where it was kept (arena or tier)."""


@dataclass(frozen=True)
class _Item:
    """A job as the tiers see it (`tiers.base.Wanted`). Its content is known once it is prepared."""

    job: EncodeJob
    watch: DropWatch
    kind: str = "image"

    @property
    def key(self) -> EmbeddingKey:
        return EmbeddingKey.from_hex(self.job.key)

    @property
    def content(self) -> bytes | None:
        return self.watch.content

    @property
    def scope(self) -> Scope:
        return self.job.scope

    @property
    def retained(self) -> bool:
        return self.job.scope.retain and not self.watch.dropped(self.job.key)


class EncodePipeline:
    """Makes embeddings for one encode worker. For use from one event loop; owns neither encoder nor manager.

    Items that wait for the tower are bounded in number and in bytes of their files; beyond it
    `EncodeOverloadedError`. `maker` makes what neither the arena nor a tier has.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        manager: MultimodalEmbeddingCacheManager,
        settings: EncodeSettings,
        registry: CollectorRegistry,
        tiers: StoredTiers | None = None,
    ) -> None:
        self._tiers = tiers or StoredTiers()
        self._manager = manager
        self._fingerprint = pixels_fingerprint(encoder.fingerprint, settings.images)
        self.maker = Maker(encoder, manager, settings, registry)
        self.flights: SingleFlight[Lease] = SingleFlight(share=Lease.clone, discard=Lease.release)
        self.queue = Admission(
            max_items=settings.max_queued,
            max_bytes=int(settings.max_waiting_image_mb * MB),
            refusal=lambda: EncodeOverloadedError(
                f"{settings.max_queued} images, or images of {settings.max_waiting_image_mb:g} MB, already "
                "wait for the vision tower; retry in a moment"
            ),
        )
        self._drops = Drops()
        flights, cache = FlightCollector(self.flights), CacheCollector({manager.name: manager})
        for part in (cache, flights, self.queue):
            registry.register(part)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides an embedding's bytes besides the file and the item's kwargs."""
        return self._fingerprint

    async def encode(self, job: EncodeJob) -> tuple[Lease, Origin]:
        """Return a lease on the embedding of `job`, which the caller releases, and where it came from.

        A job that joins a flight is not charged to the queue, and its media are not held while it waits.
        Raises `RequestError` for what is wrong with the item, `EncodeError` for what is wrong here.
        """
        watch = self._drops.watch(job.scope.tag)
        item = _Item(job, watch)
        if job.fresh:
            await self._forget(job.key)
        origin: Origin = "cached"
        lease = self._manager.lease(job.key)
        if lease is None:
            if job.key in self.flights:
                job.release_media()
            lease, joined = await self.flights.run(job.key, partial(self._load, item))
            origin = "joined" if joined else "cached" if job.brought else "encoded"
        else:
            self._tiers.offer(item, lease)
        if not job.scope.retain:
            self._manager.drop(job.key)  # the lease keeps it until its last reader is done
        return lease, origin

    async def drop(
        self, selection: Selection, *, deadline_s: float, bar_s: float
    ) -> tuple[Dropped, TierDropped]:
        """Drop what is stored, here and in the tiers, and retain nothing of it that is being encoded now.

        `bar_s` as in `DropRequest`. Raises `MmCacheError` where a tier could not; the arena has dropped then.
        """
        self._drops.bar(selection, seconds=bar_s or _DROP_S)
        self._drops.drop(selection)
        dropped = self._manager.drop_selected(selection)
        stored = await self._tiers.drop(selection, deadline_s=deadline_s)
        if not bar_s:
            self._drops.unbar(selection)
        return dropped, stored

    async def close(self) -> None:
        """Stop flights and batches."""
        await self.flights.close()
        await self.maker.close()
        await self._tiers.close()

    async def _forget(self, key: str) -> None:
        """Drop what was found wrong; a tier that fails now has its own checks when it is asked again."""
        self._manager.drop(key)
        with suppress(MmCacheError):
            await self._tiers.drop(Selection(key=key), deadline_s=_FORGET_S)

    async def _load(self, item: _Item) -> Lease:
        """One flight: from a tier, or made."""
        with self.queue.admitted(len(item.job.media)) as admitted:
            lease = await self._tiers.load(item, self._receive)
            if lease is not None:
                item.job.brought = True
                item.job.release_media()
                return lease
            stored = await self.maker.make(item.job, item.watch, admitted)
            # On the event loop, so that no drop comes between this look at the item and the commit.
            lease = stored.commit(retain=item.retained)
        self._tiers.offer(item, lease)
        return lease

    async def _receive(self, item: _Item, found: StoredEmbedding) -> Lease:
        """Take what a tier has found into the arena."""
        reserve = partial(
            self._manager.reserve,
            item.job.key,
            found.nbytes,
            owner="encode worker",
            tag=item.scope.tag,
            content=found.content,
        )
        try:
            dtype = announced_dtype(found)
            reservation = await in_thread(reserve, undo=Reservation.abandon, executor=self.maker.threads)
        except BaseException:
            found.release()
            raise
        await found.read_into(reservation, finite=True)
        return Stored(reservation, dtype, found.shape, found.metadata).commit(retain=item.retained)
