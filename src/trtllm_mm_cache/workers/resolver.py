"""The way of a request's images: from references to leased embeddings, in prompt order.

Read it top to bottom; the steps bear the numbers of the design:

    1 references   the image parts of the request, in order
    2 bytes        fetched, size and format checked
    3 key          the content is the key
    4 lookup       a hit is a lease on the arena's view; done
    5 miss         one flight per key asks the encode worker that the key chooses
    6 READ         NIXL reads straight into a reserved extent
    7 commit       only after checksum, size, shape and dtype agree

Whatever happens on the way, a lease or reservation that nobody will use is given back before
`resolve` returns or raises.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.key import EmbeddingKey, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager, Reservation
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.errors import (
    ArenaFullError,
    EmbeddingMismatchError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    EntryTooLargeError,
    MmCacheError,
    TransferError,
)
from trtllm_mm_cache.media import MediaSettings, MediaSource, probe_image
from trtllm_mm_cache.observability.pd_metrics import LookupOutcome, PdMetrics, scheme_of
from trtllm_mm_cache.transfer import Export, PeerMetadata, Reader
from trtllm_mm_cache.workers.encode_client import EncodeClient
from trtllm_mm_cache.workers.protocol import ENCODE_SECONDS, EncodeReady, EncodeRequest
from trtllm_mm_cache.workers.threads import in_thread

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_OFF_LOOP_BYTES = 64 * 1024
_UNCACHED = "resolver (uncached)"


@dataclass(frozen=True)
class ResolvedImages:
    """Leases in prompt order, to be released by the caller, and what they cost.

    `joined` of the `misses` waited for a flight that was under way. Each distinct reference counts once.
    """

    leases: tuple[Lease, ...]
    hits: int
    misses: int
    joined: int
    nbytes: int
    seconds: float

    def release(self) -> None:
        """Give every lease back. Idempotent."""
        for lease in self.leases:
            lease.release()


@dataclass(frozen=True)
class ResolverStatistics:
    """Counts since start. `uncached` embeddings were served without entering the cache."""

    retries: int
    uncached: int


@dataclass(frozen=True)
class _Found:
    """One image's lease and how it was come by."""

    lease: Lease
    outcome: LookupOutcome


@dataclass(frozen=True)
class _Item:
    """One image between step 3 and step 7. Without `retain` its embedding is for this request alone."""

    key: EmbeddingKey
    media: bytes
    processor_kwargs: Mapping[str, Any]
    variant: str
    retain: bool


class ImageResolver:
    """Resolves images for one PD worker. For use from one event loop.

    `transit` is a manager that retains nothing; it takes what `cache` has no room for, and is the
    same object as `cache` where the capacity is 0. `what_if` follows the lookups.

    With `require_salt`, a request without a salt bypasses the cache: it gets a random salt of its own, so
    that no key of it can meet another request's, here or on an encode worker; its images are not looked
    up, pass through the transit arena and are retained nowhere, nor is what was fetched for them.
    """

    def __init__(
        self,
        *,
        source: MediaSource,
        media_settings: MediaSettings,
        cache: MultimodalEmbeddingCacheManager,
        transit: MultimodalEmbeddingCacheManager,
        client: EncodeClient,
        reader: Reader,
        fingerprint: str,
        encode_timeout_s: float,
        transfer_timeout_s: float,
        metrics: PdMetrics | None = None,
        require_salt: bool = False,
        what_if: WhatIf | None = None,
    ) -> None:
        self._source = source
        self._media_settings = media_settings
        self._cache = cache
        self._transit = transit
        self._client = client
        self._reader = reader
        self._fingerprint = fingerprint
        self._encode_timeout_s = encode_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._require_salt = require_salt
        self._what_if = what_if
        self._metrics = metrics or PdMetrics()
        self._flights: SingleFlight[Lease] = SingleFlight()
        self._retries = self._uncached = 0

    async def resolve(
        self,
        references: Sequence[str],
        *,
        processor_kwargs: Mapping[str, Any],
        salt: str | None,
        variant: str,
    ) -> ResolvedImages:
        """Turn the references of one request into leases, in order.

        Each distinct reference is fetched once and each distinct content resolved once; the images
        are worked on at the same time. Raises the first image's error, with the image's index.
        """
        started = time.perf_counter()
        retain = bool(salt) or not self._require_salt
        if not retain:
            salt = secrets.token_hex(32)
        tasks: dict[str, asyncio.Task[_Found]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for index, reference in enumerate(references):
                    if reference not in tasks:
                        tasks[reference] = group.create_task(
                            self._resolve_one(index, reference, processor_kwargs, salt, variant, retain)
                        )
        except BaseExceptionGroup as failures:
            _release_finished(tasks.values())
            raise _first_error(failures) from failures
        except asyncio.CancelledError:
            _release_finished(tasks.values())
            raise
        outcomes = [task.result().outcome for task in tasks.values()]
        leases = self._in_prompt_order(references, tasks)
        return ResolvedImages(
            leases=leases,
            hits=outcomes.count("hit"),
            misses=len(outcomes) - outcomes.count("hit"),
            joined=outcomes.count("joined"),
            nbytes=sum(lease.nbytes for lease in leases),
            seconds=time.perf_counter() - started,
        )

    def statistics(self) -> ResolverStatistics:
        """Count what was retried and what was served uncached."""
        return ResolverStatistics(self._retries, self._uncached)

    @property
    def flights(self) -> SingleFlight[Lease]:
        """The flights under way, for their statistics."""
        return self._flights

    async def close(self) -> None:
        """Cancel what flies and close the media source."""
        await self._flights.close()
        await self._source.close()

    async def _resolve_one(
        self,
        index: int,
        reference: str,
        processor_kwargs: Mapping[str, Any],
        salt: str | None,
        variant: str,
        retain: bool,
    ) -> _Found:
        """Steps 2 to 7 for one image."""
        try:
            media = await self._fetch(reference, tenant=(salt or "") if retain else None)
            key = await self._key(media, processor_kwargs, salt, variant)
            looked_up = time.perf_counter()
            found = await self._find(_Item(key, media, processor_kwargs, variant, retain))
            self._metrics.found(
                found.outcome,
                nbytes=found.lease.nbytes,
                seconds=time.perf_counter() - looked_up,
                saved_seconds=found.lease.metadata.get(ENCODE_SECONDS, 0.0),
            )
        except MmCacheError as error:
            raise error.for_image(index) from error
        return found

    # 2 bytes
    async def _fetch(self, reference: str, *, tenant: str | None) -> bytes:
        with self._metrics.fetch.labels(scheme=scheme_of(reference)).time():
            media = await self._source.fetch(reference, tenant=tenant)
            # A header of megabytes (metadata) can take long to read; that of a small file cannot.
            if len(media) > _OFF_LOOP_BYTES:
                await asyncio.to_thread(probe_image, media, self._media_settings)
            else:
                probe_image(media, self._media_settings)
        return media

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
            return await asyncio.to_thread(compute) if len(media) > _OFF_LOOP_BYTES else compute()

    # 4 lookup, 5 miss
    async def _find(self, item: _Item) -> _Found:
        if item.retain and (lease := self._look_up(item.key)) is not None:
            return _Found(lease, "hit")
        lease, joined = await self._flights.run(
            item.key.hex, lambda: self._load(item), share=Lease.clone, discard=Lease.release
        )
        return _Found(lease, "joined" if joined else "miss")

    def _look_up(self, key: EmbeddingKey) -> Lease | None:
        lease = self._cache.lease(key.hex)
        if self._what_if is not None:
            self._what_if.looked_up(key.hex, None if lease is None else lease.nbytes)
        return lease

    async def _load(self, item: _Item) -> Lease:
        """One flight: ask an encode worker, READ, commit; once more on the next worker if that can help."""
        request = EncodeRequest(
            fingerprint=self._fingerprint,
            key=item.key.hex,
            media=item.media,
            processor_kwargs=dict(item.processor_kwargs),
            variant=item.variant,
            retain=item.retain,
        )
        instances = self._client.rank(item.key)
        try:
            async with asyncio.timeout(self._encode_timeout_s):
                return await self._try_instances(request, instances)
        except TimeoutError:
            raise EncodeTimeoutError(
                f"no embedding came within {self._encode_timeout_s:g} seconds; retry later"
            ) from None

    async def _try_instances(self, request: EncodeRequest, instances: Sequence[int]) -> Lease:
        failure: MmCacheError = EncodeUnavailableError(
            "no encode worker is alive, so new images cannot be encoded; text and cached images are "
            "still served; retry later"
        )
        for attempt in range(_ATTEMPTS):
            if not instances:
                break
            instance = instances[attempt % len(instances)]
            try:
                with self._metrics.encode_call.time():
                    ready = await self._client.encode(instance, request)
                ready.check_answers(request)
                return await self._read_and_commit(request, ready)
            except MmCacheError as error:
                failure = error
                alone = len(instances) == 1 and not isinstance(error, TransferError)
                if not error.retryable or alone or attempt + 1 == _ATTEMPTS:
                    break
                self._retries += 1
                logger.warning("embedding %s…: %s; trying once more", request.key[:12], error.code)
        raise failure

    # 6 READ, 7 commit
    async def _read_and_commit(self, request: EncodeRequest, ready: EncodeReady) -> Lease:
        dtype = _dtype(ready)
        peer = PeerMetadata.from_wire(ready.peer)
        # In a thread: making room may move other entries, which copies megabytes.
        reserve = partial(self._reserve, request.key, ready.nbytes, retain=request.retain)
        with self._metrics.reserve.time():
            reservation = await in_thread(reserve, undo=Reservation.abandon)
        self._uncached += reservation.owner == _UNCACHED
        export = Export(ready.token, ready.address, ready.nbytes, ready.checksum)
        with self._metrics.transfer.time():
            await self._reader.read_into(reservation, peer, export, deadline_s=self._transfer_timeout_s)
        metadata = {**ready.metadata, ENCODE_SECONDS: ready.encode_seconds}
        try:
            with self._metrics.commit.time():
                lease = reservation.commit(dtype=dtype, shape=ready.shape, metadata=metadata)
        except MmCacheError:
            reservation.abandon()
            raise
        if request.retain and self._what_if is not None:
            self._what_if.loaded(request.key, ready.nbytes)
        return lease

    def _reserve(self, key: str, nbytes: int, *, retain: bool) -> Reservation:
        """Reserve room in the cache; where every byte is leased, in the transit arena: served, not cached."""
        try:
            if retain:
                return self._cache.reserve(key, nbytes, owner="resolver")
        except (ArenaFullError, EntryTooLargeError):
            if self._transit is self._cache:
                raise
        return self._transit.reserve(key, nbytes, owner=_UNCACHED)

    @staticmethod
    def _in_prompt_order(
        references: Sequence[str], tasks: Mapping[str, asyncio.Task[_Found]]
    ) -> tuple[Lease, ...]:
        """One lease a position: a reference that stands twice gets a second lease on the same view."""
        given: set[str] = set()
        leases = []
        for reference in references:
            lease = tasks[reference].result().lease
            leases.append(lease.clone() if reference in given else lease)
            given.add(reference)
        return tuple(leases)


def _dtype(ready: EncodeReady) -> torch.dtype:
    """Return the dtype that is announced, if the size is what it makes of the shape.

    Looked at again at the commit; here, before room is made for what may be a wrong size.
    """
    dtype = getattr(torch, ready.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EmbeddingMismatchError("the encode worker announced an embedding of an unknown dtype")
    rows, width = ready.shape
    if rows * width * dtype.itemsize != ready.nbytes:
        raise EmbeddingMismatchError(
            f"the encode worker announced {ready.nbytes} bytes for {rows} rows of {width} {ready.dtype}"
        )
    return dtype


def _release_finished(tasks: Any) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result().lease.release()


def _first_error(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to raise for a request: ours before foreign ones, the first image's before later ones."""
    known = [error for error in failures.exceptions if isinstance(error, MmCacheError)]
    if known:
        return min(known, key=lambda error: error.image_index or 0)
    return failures.exceptions[0]
