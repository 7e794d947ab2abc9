"""The way of a request's items: from references to leased embeddings, in prompt order.

Read it top to bottom; the steps bear the numbers of the design:

    1 references   the media parts of the request, in order: `request.py`
    2 bytes        fetched, size and format checked: `fetch.py`
    3 key          the content is the key
    4 lookup       a hit is a lease on the arena's view; done
    5 miss         one flight per key; the tiers are asked in order: `tiers/chain.py`; in an aggregated worker
                   the engine's own tower makes it during step 8, and steps 6 and 7 are `tiers/own_tower.py`
    6 fill         the tier writes straight into a reserved extent: `tiers/receive.py`
    7 commit       only after all that was announced agrees

Whatever happens on the way, a lease or reservation without a user is released before `resolve` returns or
raises, and what it raises does not keep the items' bytes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trtllm_mm_cache.cache.key import EmbeddingKey, content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EntryTooLargeError,
    MediaTooLargeError,
    MmCacheError,
    OverloadedError,
)
from trtllm_mm_cache.observability.cache_metrics import FlightCollector
from trtllm_mm_cache.observability.traces import span
from trtllm_mm_cache.pd.fetch import OFF_LOOP_BYTES, MediaFetcher
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.pd.request import PdRequest
from trtllm_mm_cache.pd.resolved import Found, ResolvedItems, all_or_first_error
from trtllm_mm_cache.runtime.admission import Admission, Admitted
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.drops import Drops
from trtllm_mm_cache.settings import MB, PdSettings
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.misses import Misses

logger = logging.getLogger(__name__)

_DROP_S = 3600.0  # more than a drop may take; where it fails, until the next one


class ItemResolver:
    """Resolves the items of one PD worker's requests. For use from one event loop.

    Until an item's key is known, its bytes are incoming: inside the request, or being fetched. They are at
    most `max_incoming_image_mb` in all, beyond which a request with large images is refused with an
    `OverloadedError`; text and small images still get through. Misses hold the bytes of their items until
    they have their embeddings: at most `max_waiting_image_mb` in all, beyond which a miss is refused with an
    `OverloadedError` and hits are still served. Only the miss that starts a flight holds bytes and counts;
    those that join it hold nothing but their place.
    `what_if` follows the lookups.
    """

    def __init__(
        self,
        cache: MultimodalEmbeddingCacheManager,
        what_if: WhatIf | None,
        misses: Misses,
        fingerprint: str,
        settings: PdSettings,
        metrics: PdMetrics,
    ) -> None:
        self._cache = cache
        self._what_if = what_if
        self._misses = misses
        self._fingerprint = fingerprint
        self._require_salt = settings.multimodal_embedding_cache_require_salt
        self._metrics = metrics
        self._fetcher = MediaFetcher(settings, metrics)
        self._drops = Drops()
        self.waiting = Admission(
            max_items=sys.maxsize,
            max_bytes=int(settings.max_waiting_image_mb * MB),
            refusal=lambda: OverloadedError(
                f"new images of more than {settings.max_waiting_image_mb:g} MB wait for their embeddings "
                "already; cached images are still served; retry in a moment"
            ),
        )
        limit = f"{settings.max_incoming_image_mb:g} MB (--max-incoming-image-mb)"
        self.incoming = Admission(
            what="incoming",
            max_items=sys.maxsize,
            max_bytes=int(settings.max_incoming_image_mb * MB),
            refusal=lambda: OverloadedError(
                f"images of nearly {limit} are on their way in already; retry in a moment"
            ),
            too_large=lambda: MediaTooLargeError(
                f"the request's images have more than {limit} together; send fewer or smaller ones"
            ),
            room_for_small=True,
        )
        for part in (FlightCollector(misses.flights), self.waiting, self.incoming):
            metrics.registry.register(part)

    async def resolve(self, request: PdRequest, *, variant: str) -> ResolvedItems:
        """Turn the references of one request into leases, in order.

        Each distinct reference is fetched once and each distinct content resolved once; the items
        are worked on at the same time. Raises the first item's error, with the item's index; or, where they
        find no room and never could, an `InvalidRequestError`.
        """
        started = time.perf_counter()
        scope = Scope.of(request.generation.cache_salt, require_salt=self._require_salt)
        first_at: dict[Reference, int] = {}
        places = [first_at.setdefault(each, index) for index, each in enumerate(request.references)]
        needs, filling = dict[str, int](), set[str]()
        with self.incoming.admitted(sum(each.nbytes for each in request.references)) as incoming:
            for index, reference in enumerate(request.references):
                if places[index] != index:
                    reference.take()
                    incoming.shrink(reference.nbytes)
            works = [
                self._resolve_one(index, reference, request, scope, variant, incoming, needs, filling)
                for reference, index in first_at.items()
            ]
            try:
                found = dict(zip(first_at.values(), await all_or_first_error(works), strict=True))
            except (ArenaFullError, EntryTooLargeError):
                self._misses.check_can_fit(needs, retained=scope.retain)
                raise
        return ResolvedItems.of(places, found, seconds=time.perf_counter() - started)

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop embeddings, and forget every file that was fetched over HTTP.

        What a request holds remains valid for it. What is under way is served and not retained; this returns
        when it has arrived, so that an encode worker that is asked to drop next misses nothing of it.
        """
        selection = request.selection
        # Until the tiers have dropped too, nothing of it is retained: they may still bring it.
        self._drops.bar(selection, seconds=request.bar_s or _DROP_S)
        self._drops.drop(selection)
        dropped = self._cache.drop_selected(selection)
        if self._what_if is not None:
            self._what_if.dropped(selection, dropped.keys)
        media = self._fetcher.forget()
        under_way = await self._drops.ended(selection, deadline_s=request.deadline_s)
        stored = await self._misses.drop(selection, deadline_s=request.deadline_s)
        if not request.bar_s:
            self._drops.unbar(selection)
        return DropReport(
            entries=dropped.entries,
            nbytes=dropped.nbytes,
            media=media,
            under_way=under_way + stored.unfinished,
            stored=stored.entries,
            stored_bytes=stored.nbytes,
        )

    async def close(self) -> None:
        """Cancel what flies, close the tiers and the media source."""
        await self._misses.close()
        await self._fetcher.close()

    async def _resolve_one(
        self,
        index: int,
        reference: Reference,
        request: PdRequest,
        scope: Scope,
        variant: str,
        incoming: Admitted,
        needs: dict[str, int],
        filling: set[str],
    ) -> Found:
        """Steps 2 to 7 for one item, whose bytes are `incoming` until its key is known."""
        fetched = 0

        def grow(nbytes: int) -> None:
            nonlocal fetched
            incoming.grow(nbytes)
            fetched += nbytes

        try:
            watch = self._drops.watch(scope.tag)
            media, info = await self._fetcher.fetch(reference, scope, grow)
            description = ItemDescription(
                info.width, info.height, request.processor_kwargs, variant, reference.kind
            )
            key, watch.content = await self._key(media, description, scope)
            item = MissingItem(key, media, description, scope, watch, needs, filling)
            del media, watch  # the item's now, which may forget them
            incoming.shrink(reference.nbytes + fetched)
            looked_up = time.perf_counter()
            with span("lookup") as current:
                found = await self._find(item)
                current.set_attribute("outcome", found.outcome)
            needs[key.hex] = found.lease.nbytes
            self._metrics.found(
                found.outcome,
                nbytes=found.lease.nbytes,
                seconds=time.perf_counter() - looked_up,
                saved_seconds=found.lease.metadata.encode_seconds,
            )
        except MmCacheError as error:
            raise error.for_item(index, reference.kind) from error
        logger.debug("image %d: %s, key %s", index + 1, found.outcome, key, extra={"key": key.hex})
        return found

    # 3 key
    async def _key(
        self, media: bytes, description: ItemDescription, scope: Scope
    ) -> tuple[EmbeddingKey, bytes]:
        """Return the key and the digest of the content, which the key holds: the media are hashed once."""

        def compute() -> tuple[EmbeddingKey, bytes]:
            content = content_digest(media)
            key = embedding_key(
                content,
                fingerprint=self._fingerprint,
                kind=description.kind,
                processor_kwargs=description.processor_kwargs,
                scope=scope,
                variant=description.variant,
            )
            return key, content

        with self._metrics.key.time():
            return await asyncio.to_thread(compute) if len(media) > OFF_LOOP_BYTES else compute()

    # 4 lookup, 5 miss
    async def _find(self, item: MissingItem) -> Found:
        if item.scope.retain and (lease := self._look_up(item.key)) is not None:
            self._misses.used(item, lease)
            return Found(lease, "hit")
        held, joined = await self._misses.find(item, self._loading)
        return Found(held, "joined" if joined else "miss")

    @contextmanager
    def _loading(self, item: MissingItem) -> Iterator[Admitted]:
        with (
            self.waiting.admitted(len(item.media)) as admitted,
            self._drops.loading(item.key.hex, item.watch),
        ):
            yield admitted

    def _look_up(self, key: EmbeddingKey) -> Lease | None:
        lease = self._cache.lease(key.hex)
        if self._what_if is not None:
            self._what_if.looked_up(key.hex, None if lease is None else lease.nbytes)
        return lease
