"""Step 2 for one image: from its reference to bytes whose size and format are checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from trtllm_mm_cache.errors import OverloadedError
from trtllm_mm_cache.media import ImageInfo, MediaSettings, MediaSource, probe_image
from trtllm_mm_cache.pd.metrics import PdMetrics, scheme_of

OFF_LOOP_BYTES = 64 * 1024
"""Media of more than this is read and hashed in a thread."""


class MediaFetcher:
    """Fetches images for one PD worker. For use from one event loop.

    At most `max_fetches` images are fetched over HTTP at a time; further ones wait for their turn, at most
    `wait_s` seconds, and are then refused with an `OverloadedError`.
    """

    def __init__(
        self,
        source: MediaSource,
        settings: MediaSettings,
        *,
        max_fetches: int,
        wait_s: float,
        metrics: PdMetrics,
    ) -> None:
        self._source = source
        self._settings = settings
        self._turns = asyncio.Semaphore(max_fetches)
        self._wait_s = wait_s
        self._metrics = metrics

    async def fetch(self, reference: str, *, tenant: str | None) -> tuple[bytes, ImageInfo]:
        """Return the bytes of the image and what its header says. Raises `RequestError`, `OverloadedError`.

        `tenant` is who may be given the same file again without another fetch; None: nobody.
        """
        scheme = scheme_of(reference)
        with self._metrics.fetch.labels(scheme=scheme).time():
            async with self._turn() if scheme in ("http", "https") else nullcontext():
                media = await self._source.fetch(reference, tenant=tenant)
            # A header of megabytes (metadata) can take long to read; that of a small file cannot.
            if len(media) > OFF_LOOP_BYTES:
                return media, await asyncio.to_thread(probe_image, media, self._settings)
            return media, probe_image(media, self._settings)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._wait_s):
                await self._turns.acquire()
        except TimeoutError:
            raise OverloadedError(
                f"the image's turn to be fetched did not come within {self._wait_s:g} seconds: too "
                "many others are being fetched; retry in a moment"
            ) from None
        try:
            yield
        finally:
            self._turns.release()
