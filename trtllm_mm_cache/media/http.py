"""http(s) references to bytes: redirects, the private cache (RFC 9111) and the deadline of one fetch.

`HttpFetcher` asks `http_cache.py` what it has, `freshness.py` whether that may be used, and `origin.py`, the
one place with connections, for the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from traceback import clear_frames

import httpcore2
import httpx2

from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaFetchError
from trtllm_mm_cache.media.freshness import FIELDS, Clock, Fields, Reuse, now
from trtllm_mm_cache.media.http_cache import CachedResponse, ResponseCache
from trtllm_mm_cache.media.network import Resolver
from trtllm_mm_cache.media.origin import MediaServers, check_size
from trtllm_mm_cache.media.url import parse_url, redirected
from trtllm_mm_cache.settings import MB, MediaSettings

_REDIRECTS = {301, 302, 303, 307, 308}


class HttpFetcher:
    """Fetches http(s) URLs, of at most `max_bytes` each. Belongs to one event loop; `close` it there.

    `clock` tells how old a cached response is.
    """

    def __init__(
        self, settings: MediaSettings, max_bytes: int, resolver: Resolver | None = None, clock: Clock = now
    ) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._clock = clock
        self._cache = ResponseCache(int(settings.http_cache_mb * MB))
        self._forgettings = 0
        self._servers = MediaServers(settings, max_bytes, resolver)

    async def fetch(self, reference: str, scope: Scope, grow: Callable[[int], None]) -> bytes:
        """Return the body that `reference` leads to: from the cache while it is fresh, else from the server.

        Each salt has cached responses of its own; a scope without `retain` finds none and leaves none.
        `grow` is told of the bytes as they arrive, and may raise an error of its own.
        Raises `MediaReferenceError`, `MediaForbiddenError`, `MediaFetchError`, `MediaTooLargeError`.
        """
        url = parse_url(reference)
        seconds = self._settings.media_timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await self._follow(url, scope, grow)
        except (TimeoutError, httpcore2.TimeoutException) as error:
            # Raised below: asyncio's error leads to the task that had the deadline, and the task, when it
            # ends with an error, to that. As a cause it would keep what has arrived until the collector runs.
            clear_frames(error.__traceback__)
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpx2.HTTPError) as error:
            # httpcore turns an error into its own in a context manager, whose frame keeps the first one.
            # From Python 3.12 that one's traceback leads back to the frame, and to all that called it.
            clear_frames(error.__traceback__)
            raise MediaFetchError("the media server's answer broke off or was not valid HTTP") from error
        raise MediaFetchError(f"the media server did not deliver within {seconds:g} seconds")

    def forget(self) -> int:
        """Forget every cached response; what is arriving is not kept. Return how many there were."""
        self._forgettings += 1
        return self._cache.clear()

    async def close(self) -> None:
        """Close connections and free the cache. Fetches that still run fail."""
        await self._servers.close()
        self._cache.clear()

    async def _follow(self, url: httpx2.URL, scope: Scope, grow: Callable[[int], None]) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            response = await (
                self._through_cache(url, scope, grow) if scope.retain else self._ask(url, None, grow)
            )
            if response.location is None:
                return response.body
            url = redirected(url, response.location)
        raise MediaFetchError(
            f"the URL is redirected more than {self._settings.max_redirects} times; send the final one"
        )

    async def _through_cache(
        self, url: httpx2.URL, scope: Scope, grow: Callable[[int], None]
    ) -> CachedResponse:
        key = _cache_key(scope.salt or "", url)
        cached = self._cache.get(key)
        if cached is not None and cached.reuse.is_fresh(self._clock()):
            return cached
        forgettings = self._forgettings
        response = await self._ask(url, cached, grow)
        if forgettings == self._forgettings:
            self._cache.put(key, response)
        return response

    async def _ask(
        self, url: httpx2.URL, cached: CachedResponse | None, grow: Callable[[int], None]
    ) -> CachedResponse:
        """Return what the server has now, which may be what is `cached`."""
        asked = self._clock()
        answer = await self._servers.get(url, cached.reuse.conditions if cached is not None else {})
        try:
            received = self._clock()
            fields = _fields(answer.headers)
            if answer.status_code == 304 and cached is not None and cached.reuse.conditions:
                renewed = cached.reuse.renewed(fields, asked=asked, received=received)
                if renewed is not None:
                    return CachedResponse(renewed, cached.body)
            else:
                reuse = Reuse.of(fields, asked=asked, received=received)
                if answer.status_code in _REDIRECTS:
                    return CachedResponse(reuse, location=answer.headers.get("location", ""))
                return CachedResponse(reuse, await self._body(answer, grow))
        finally:
            await answer.aclose()
        return await self._ask(url, None, grow)  # the 304 was about something that is not here

    async def _body(self, answer: httpx2.Response, grow: Callable[[int], None]) -> bytes:
        if answer.status_code not in {200, 203}:
            raise MediaFetchError(f"{self._servers.name} answered with status {answer.status_code}")
        declared = answer.headers.get("content-length", "0")
        if declared.isdecimal():
            check_size(int(declared), self._max_bytes)
        body = bytearray()
        async for chunk in answer.aiter_bytes():
            check_size(len(body) + len(chunk), self._max_bytes)
            grow(len(chunk))
            body += chunk
            # A small coded chunk can decode into many large ones without a pause of its own.
            await asyncio.sleep(0)
        return bytes(body)


def _fields(headers: httpx2.Headers) -> Fields:
    """Return the lines of each header field that decides about reuse."""
    return {name: tuple(headers.get_list(name)) for name in FIELDS if name in headers}


def _cache_key(salt: str, url: httpx2.URL) -> str:
    """Return the cache's key; the length before the salt keeps two pairs from looking alike."""
    return hashlib.sha256(f"{len(salt)}:{salt}{url}".encode()).hexdigest()
