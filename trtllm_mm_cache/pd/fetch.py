"""Step 2 for one item: from its reference to bytes whose size and format are checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress

from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import OverloadedError
from trtllm_mm_cache.media import ImageInfo, MediaSource, probe_image
from trtllm_mm_cache.pd.metrics import PdMetrics, scheme_of
from trtllm_mm_cache.pd.reference import Reference
from trtllm_mm_cache.settings import PdSettings

OFF_LOOP_BYTES = 64 * 1024
"""Media of more than this is read and hashed in a thread."""


class MediaFetcher:
    """Fetches media for one PD worker. For use from one event loop.

    A bounded number of references is fetched over HTTP at a time; further ones wait for their turn, at most
    the media timeout, and are then refused with an `OverloadedError`.
    """

    def __init__(self, settings: PdSettings, metrics: PdMetrics) -> None:
        self._source = MediaSource(settings.media, settings.images)
        self._limits = settings.images
        self._turns = asyncio.Semaphore(settings.media.max_fetches)
        self._wait_s = settings.media.media_timeout_s
        self._metrics = metrics

    async def fetch(
        self, reference: Reference, scope: Scope, grow: Callable[[int], None]
    ) -> tuple[bytes, ImageInfo]:
        """Return the bytes of the image and what its header says. Raises `RequestError`, `OverloadedError`.

        The reference is taken. `grow` is told of bytes as they arrive from elsewhere, and may refuse them.
        What was fetched in a `scope` is used again in that scope alone.
        """
        source = reference.take()
        scheme = scheme_of(source)
        with self._metrics.fetch.labels(scheme=scheme).time():
            async with self._turn() if scheme in ("http", "https") else nullcontext():
                media = await self._source.fetch(source, scope, grow)
            del source  # a data: URL is longer than what it stands for
            # A header of megabytes (metadata) can take long to read; that of a small file cannot.
            if len(media) > OFF_LOOP_BYTES:
                return media, await asyncio.to_thread(probe_image, media, self._limits)
            return media, probe_image(media, self._limits)

    def forget(self) -> int:
        """Forget every file that was fetched over HTTP; return how many were kept."""
        return self._source.forget()

    async def close(self) -> None:
        """Close connections."""
        await self._source.close()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        acquired = False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                acquired = await self._turns.acquire()
        if not acquired:
            raise OverloadedError(
                f"the image's turn to be fetched did not come within {self._wait_s:g} seconds: too "
                "many others are being fetched; retry in a moment"
            )
        try:
            yield
        finally:
            self._turns.release()
