"""The way of a request's images: from references to leased embeddings, in prompt order.

Read it top to bottom; the steps bear the numbers of the design:

    1 references   the image parts of the request, in order
    2 bytes        fetched, size and format checked: `fetcher.py`
    3 key          the content is the key
    4 lookup       a hit is a lease on the arena's view; done
    5 miss         one flight per key; `loader.py` asks the encode worker that the key chooses
    6 READ         NIXL reads straight into a reserved extent: `receiver.py`
    7 commit       only after all that was announced agrees

What the images of a request are together is in `resolved_images.py`. Whatever happens on the way, a lease or
reservation that nobody will use is given back before `resolve` returns or raises.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.key import EmbeddingKey, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import salt_tag
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.errors import MmCacheError, OverloadedError
from trtllm_mm_cache.media import MediaSettings, MediaSource
from trtllm_mm_cache.observability.traces import span
from trtllm_mm_cache.pd.fetch import OFF_LOOP_BYTES, MediaFetcher
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.pd.resolved_images import Found, ResolvedItems, first_error, release_finished
from trtllm_mm_cache.runtime.admission import Admission, AdmissionStatistics
from trtllm_mm_cache.runtime.control import DropReport, DropRequest
from trtllm_mm_cache.runtime.messages import ENCODE_SECONDS
from trtllm_mm_cache.runtime.passages import Passages
from trtllm_mm_cache.settings import MB
from trtllm_mm_cache.tiers.breaker import BreakerStatistics
from trtllm_mm_cache.tiers.loader import EmbeddingLoader, LoaderStatistics
from trtllm_mm_cache.tiers.missing_image import MissingItem

logger = logging.getLogger(__name__)


class ItemResolver:
    """Resolves images for one PD worker. For use from one event loop.

    With `require_salt`, a request without a salt bypasses the cache: it gets a random salt of its own, so
    that no key of it can meet another request's, here or on an encode worker; its images are not looked
    up, pass through the transit arena and are retained nowhere, nor is what was fetched for them.

    At most `max_fetches` images are fetched over HTTP at a time; further ones wait for their turn, at most
    `fetch_wait_s` seconds. Misses hold the bytes of their images until they have their embeddings: at most
    `max_waiting_bytes` in all, beyond which a miss is refused and hits are still served. Either refusal is
    an `OverloadedError`. `what_if` follows the lookups.
    """

    def __init__(
        self,
        *,
        source: MediaSource,
        media_settings: MediaSettings,
        cache: MultimodalEmbeddingCacheManager,
        loader: EmbeddingLoader,
        fingerprint: str,
        max_fetches: int,
        fetch_wait_s: float,
        max_waiting_bytes: int,
        metrics: PdMetrics | None = None,
        require_salt: bool = False,
        what_if: WhatIf | None = None,
    ) -> None:
        self._source = source
        self._cache = cache
        self._loader = loader
        self._fingerprint = fingerprint
        self._require_salt = require_salt
        self._what_if = what_if
        self._metrics = metrics or PdMetrics()
        self._fetcher = MediaFetcher(
            source, media_settings, max_fetches=max_fetches, wait_s=fetch_wait_s, metrics=self._metrics
        )
        self._flights: SingleFlight[Lease] = SingleFlight()
        self._passages = Passages()
        self._waiting = Admission(
            max_items=sys.maxsize,
            max_bytes=max_waiting_bytes,
            refusal=lambda: OverloadedError(
                f"new images of more than {max_waiting_bytes // MB} MB wait for their embeddings already; "
                "cached images are still served; retry in a moment"
            ),
        )

    async def resolve(
        self,
        references: Sequence[str],
        *,
        processor_kwargs: Mapping[str, Any],
        salt: str | None,
        variant: str,
    ) -> ResolvedItems:
        """Turn the references of one request into leases, in order.

        Each distinct reference is fetched once and each distinct content resolved once; the images
        are worked on at the same time. Raises the first image's error, with the image's index.
        """
        started = time.perf_counter()
        retain = bool(salt) or not self._require_salt
        tag = salt_tag(salt) if salt else None
        if not retain:
            salt = secrets.token_hex(32)
        tasks: dict[str, asyncio.Task[Found]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for index, reference in enumerate(references):
                    if reference not in tasks:
                        tasks[reference] = group.create_task(
                            self._resolve_one(index, reference, processor_kwargs, salt, variant, retain, tag)
                        )
        except BaseExceptionGroup as failures:
            release_finished(tasks.values())
            raise first_error(failures) from failures
        except asyncio.CancelledError:
            release_finished(tasks.values())
            raise
        found = {reference: task.result() for reference, task in tasks.items()}
        return ResolvedItems.of(references, found, seconds=time.perf_counter() - started)

    def statistics(self) -> LoaderStatistics:
        """Count what was retried and what was served uncached."""
        return self._loader.statistics()

    def breakers(self) -> BreakerStatistics:
        """Return a snapshot of the encode workers' breakers."""
        return self._loader.breakers()

    def waiting(self) -> AdmissionStatistics:
        """Count the images that wait for their embeddings, and their bytes."""
        return self._waiting.statistics()

    @property
    def flights(self) -> SingleFlight[Lease]:
        """The flights under way, for their statistics."""
        return self._flights

    async def drop(self, request: DropRequest) -> DropReport:
        """Drop embeddings, and forget every file that was fetched over HTTP.

        What a request holds stays true for it. What is on its way is served and not retained; this returns
        when it has arrived, so that an encode worker that is asked to drop next misses nothing of it.
        """
        selection = request.selection
        self._passages.drop(selection)
        dropped = self._cache.drop_selected(selection)
        if self._what_if is not None:
            self._what_if.dropped(selection, dropped.keys)
        media = self._source.forget()
        under_way = await self._passages.ended(selection, deadline_s=request.deadline_s)
        return DropReport(entries=dropped.entries, nbytes=dropped.nbytes, media=media, under_way=under_way)

    async def close(self) -> None:
        """Cancel what flies and close the media source."""
        await self._flights.close()
        await self._loader.close()
        await self._source.close()

    async def _resolve_one(
        self,
        index: int,
        reference: str,
        processor_kwargs: Mapping[str, Any],
        salt: str | None,
        variant: str,
        retain: bool,
        tag: bytes | None,
    ) -> Found:
        """Steps 2 to 7 for one image."""
        passage = self._passages.begin(tag)
        try:
            media, info = await self._fetcher.fetch(reference, tenant=(salt or "") if retain else None)
            key = await self._key(media, processor_kwargs, salt, variant)
            looked_up = time.perf_counter()
            description = ItemDescription(info.width, info.height, processor_kwargs, variant)
            with span("lookup") as current:
                found = await self._find(MissingItem(key, media, description, retain, passage))
                current.set_attribute("outcome", found.outcome)
            self._metrics.found(
                found.outcome,
                nbytes=found.lease.nbytes,
                seconds=time.perf_counter() - looked_up,
                saved_seconds=found.lease.metadata.get(ENCODE_SECONDS, 0.0),
            )
        except MmCacheError as error:
            raise error.for_item(index) from error
        logger.debug("image %d: %s, key %s", index + 1, found.outcome, key, extra={"key": key.hex})
        return found

    # 3 key
    async def _key(
        self, media: bytes, processor_kwargs: Mapping[str, Any], salt: str | None, variant: str
    ) -> EmbeddingKey:
        def compute() -> EmbeddingKey:
            return embedding_key(
                media,
                fingerprint=self._fingerprint,
                processor_kwargs=processor_kwargs,
                salt=salt,
                variant=variant,
            )

        with self._metrics.key.time():
            return await asyncio.to_thread(compute) if len(media) > OFF_LOOP_BYTES else compute()

    # 4 lookup, 5 miss
    async def _find(self, image: MissingItem) -> Found:
        if image.retain and (lease := self._look_up(image.key)) is not None:
            return Found(lease, "hit")
        with self._waiting.admitted(len(image.media)):
            lease, joined = await self._flights.run(
                image.key.hex, lambda: self._load(image), share=Lease.clone, discard=Lease.release
            )
        return Found(lease, "joined" if joined else "miss")

    async def _load(self, image: MissingItem) -> Lease:
        with self._passages.loading(image.key.hex, image.passage):
            return await self._loader.load(image)

    def _look_up(self, key: EmbeddingKey) -> Lease | None:
        lease = self._cache.lease(key.hex)
        if self._what_if is not None:
            self._what_if.looked_up(key.hex, None if lease is None else lease.nbytes)
        return lease
