"""References to bytes: the one door through which media enters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaFetchError, MediaReferenceError, MediaTooLargeError
from trtllm_mm_cache.media.data_url import check_size, decode_data_url
from trtllm_mm_cache.media.file import read_file_url
from trtllm_mm_cache.media.freshness import Clock, now
from trtllm_mm_cache.media.http import HttpFetcher
from trtllm_mm_cache.media.network import Resolver
from trtllm_mm_cache.settings import ImageLimits, MediaSettings

_INLINE_CHARACTERS = 128 * 1024
"""Up to this length a data: URL is decoded on the event loop: quicker than a thread's round trip."""

Grow = Callable[[int], None]

_FILE_TIMEOUT = 30.0
"""Seconds that a fetch waits for a file system that does not answer."""


def _unbounded(nbytes: int) -> None:
    """Take any number of bytes."""


class MediaSource:
    """Turns data:, http(s): and file: references into bytes, within the limits it is given.

    Belongs to one event loop. Any number of fetches may run at a time; cancelling one leaves
    nothing behind but, for a file or a DNS look-up, a thread that ends on its own.
    `resolver` replaces the system's name resolution; its addresses are judged all the same. `clock` tells how
    old a response is that was fetched over HTTP.
    """

    def __init__(
        self,
        settings: MediaSettings,
        limits: ImageLimits,
        *,
        resolver: Resolver | None = None,
        clock: Clock = now,
    ) -> None:
        self._allowed_folder = settings.allowed_local_media_path
        self._max_bytes = limits.max_file_bytes
        self._http = HttpFetcher(settings, self._max_bytes, resolver, clock)
        # Apart from each other: a file system that hangs must not hold up data: URLs.
        self._decoders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="media-data")
        self._readers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="media-file")
        self._closed = False

    async def fetch(self, reference: str | bytes, scope: Scope, grow: Grow = _unbounded) -> bytes:
        """Return the bytes that `reference` stands for, unchanged and not yet looked into.

        Bytes, which the frontend decoded from a data: URL, are only measured.

        What is fetched over HTTP for one salt is reused for that salt alone: a URL that answers at once would
        tell the others that it was asked for. For a scope without `retain` nothing is reused or kept.
        Raises `MediaReferenceError` where it cannot be parsed or has another scheme,
        `MediaForbiddenError` where this server does not go, `MediaFetchError` where nothing usable
        came back in time, `MediaTooLargeError` beyond the limit on a file's bytes. No message repeats the
        reference or where it led. `grow` is told of bytes before they are kept, of http(s) and file:
        references alone; what it raises ends the fetch.
        """
        if self._closed:
            raise MediaFetchError("the server is shutting down")
        limit = self._max_bytes
        if isinstance(reference, bytes):
            check_size(len(reference), limit)
            return reference
        scheme = reference[:8].partition(":")[0].lower()
        if scheme == "data":
            # Nothing decodes from more than three characters a byte; longer is refused unread.
            if len(reference) > 4 * limit + 4096:
                raise MediaTooLargeError(f"the data: URL carries more than the limit of {limit} bytes")
            if len(reference) <= _INLINE_CHARACTERS:
                return decode_data_url(reference, limit)
            return await _run_in(self._decoders, lambda: decode_data_url(reference, limit))
        if scheme in {"http", "https"}:
            return await self._http.fetch(reference, scope, grow)
        if scheme == "file":
            folder = self._allowed_folder
            try:
                async with asyncio.timeout(_FILE_TIMEOUT):
                    media = await _run_in(self._readers, lambda: read_file_url(reference, folder, limit))
                    grow(len(media))
                    return media
            except TimeoutError:
                pass  # raised below, without it as its context: see `HttpFetcher.fetch`
            raise MediaFetchError("the file could not be read in time")
        raise MediaReferenceError("the media reference is none of data:, http:, https: and file: URLs")

    def forget(self) -> int:
        """Forget every file fetched over HTTP; return how many were kept. Fetches that run are not kept."""
        return self._http.forget()

    async def close(self) -> None:
        """Close connections, free the HTTP cache, take no further fetches; those that run fail."""
        self._closed = True
        await self._http.close()
        for threads in (self._decoders, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _run_in(threads: ThreadPoolExecutor, work: Callable[[], bytes]) -> bytes:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
