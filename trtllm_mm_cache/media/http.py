"""http(s) references to bytes, through a private HTTP cache (RFC 9111) and a guarded network.

From the caller down: `HttpFetcher` follows redirects and bounds time and size; hishel's cache
transport answers what is fresh and revalidates what is not; `_OriginTransport` speaks to the server
over connections that `GuardedBackend` has checked. No client object stands on top of them, because
everything it would add (cookies, credentials from the environment, proxies, redirects of its own,
URLs in logs) must not happen here.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate, mktime_tz, parsedate_tz
from traceback import clear_frames

import httpcore2
import httpx2
from hishel import CacheOptions
from hishel.httpx2 import AsyncCacheTransport

from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import (
    MediaFetchError,
    MediaForbiddenError,
    MediaReferenceError,
    MediaTooLargeError,
)
from trtllm_mm_cache.media.http_cache import MemoryStorage
from trtllm_mm_cache.media.network import GuardedBackend, Resolver, SystemResolver
from trtllm_mm_cache.settings import MB, MediaSettings

_MAX_URL_LENGTH = 8192
_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {
    "accept": "image/*",
    # Images are compressed already, and a coding on top is one more thing that can explode. A server
    # that codes all the same is decoded, within the size limit.
    "accept-encoding": "identity",
    "user-agent": "trtllm-mm-cache",
}


class HttpFetcher:
    """Fetches http(s) URLs, of at most `max_bytes` each. Belongs to one event loop; `close` it there."""

    def __init__(self, settings: MediaSettings, max_bytes: int, resolver: Resolver | None = None) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._system_resolver = SystemResolver()
        backend = GuardedBackend(
            resolver or self._system_resolver, allow_private=settings.allow_private_addresses
        )
        self._storage = MemoryStorage(int(settings.http_cache_mb * MB))
        self._nothing = MemoryStorage(0)
        self._forgettings = 0
        self._transport = AsyncCacheTransport(
            _OriginTransport(settings.max_fetches, max_bytes, backend),
            storage=self._storage,
            rfc=CacheOptions(shared=False),
        )

    async def fetch(self, reference: str, scope: Scope, grow: Callable[[int], None]) -> bytes:
        """Return the body that `reference` leads to: from the cache while it is fresh, else from the server.

        Each salt has cached responses of its own; a scope without `retain` finds none and leaves none.
        `grow` is told of the bytes as they arrive, and may raise an error of its own.
        Raises `MediaReferenceError`, `MediaForbiddenError`, `MediaFetchError`, `MediaTooLargeError`.
        """
        url = _parse(reference)
        seconds = self._settings.media_timeout_s
        forgettings = self._forgettings
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
        finally:
            if forgettings != self._forgettings:
                self._storage.clear()  # what this fetch brought was on its way then
        raise MediaFetchError(f"the media server did not deliver within {seconds:g} seconds")

    def forget(self) -> int:
        """Forget every cached response, arriving ones included; return how many there were."""
        self._forgettings += 1
        return self._storage.clear()

    async def close(self) -> None:
        """Close connections and free the cache. Fetches that still run fail."""
        await self._transport.aclose()
        self._system_resolver.close()

    async def _follow(self, url: httpx2.URL, scope: Scope, grow: Callable[[int], None]) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            response = await self._transport.handle_async_request(self._request(url, scope))
            try:
                if response.status_code in _REDIRECTS:
                    url = _redirected(url, response)
                else:
                    return await self._body(response, grow)
            finally:
                await response.aclose()
        raise MediaFetchError(
            f"the URL is redirected more than {self._settings.max_redirects} times; send the final one"
        )

    def _request(self, url: httpx2.URL, scope: Scope) -> httpx2.Request:
        connect, total = self._settings.connect_timeout_s, self._settings.media_timeout_s
        timeouts = {"connect": connect, "read": total, "write": total, "pool": total}
        caching = {"key": _cache_key(scope.salt or "", url)} if scope.retain else {"storage": self._nothing}
        extensions = {"timeout": timeouts, "caching": caching}
        return httpx2.Request("GET", url, headers=_HEADERS, extensions=extensions)

    async def _body(self, response: httpx2.Response, grow: Callable[[int], None]) -> bytes:
        if response.status_code not in {200, 203}:
            raise MediaFetchError(f"the media server answered with status {response.status_code}")
        declared = response.headers.get("content-length", "0")
        if declared.isdecimal():
            _check_size(int(declared), self._max_bytes)
        body = bytearray()
        async for chunk in response.aiter_bytes():
            _check_size(len(body) + len(chunk), self._max_bytes)
            grow(len(chunk))
            body += chunk
            # A small coded chunk can decode into many large ones without a pause of its own.
            await asyncio.sleep(0)
        return bytes(body)


class _OriginTransport(httpx2.AsyncBaseTransport):
    """httpx2's transport interface over an httpcore pool with our network backend."""

    def __init__(self, max_connections: int, max_bytes: int, backend: GuardedBackend) -> None:
        self._max_bytes = max_bytes
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=max_connections,
            max_keepalive_connections=16,
            keepalive_expiry=30.0,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; exceptions are httpcore's and this package's own."""
        url = request.url
        answer = await self._pool.handle_async_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=request.headers.raw,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(
            answer.status,
            headers=_with_cache_policy(answer.status, httpx2.Headers(answer.headers)),
            stream=_BoundedStream(answer, self._max_bytes),
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    """A body as it comes from the wire, cut off with an error at the size limit."""

    def __init__(self, answer: httpcore2.Response, max_bytes: int) -> None:
        self._answer = answer
        self._max_bytes = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in self._answer.aiter_stream():
            received += len(chunk)
            _check_size(received, self._max_bytes)
            yield chunk

    async def aclose(self) -> None:
        await self._answer.aclose()


def _with_cache_policy(status: int, headers: httpx2.Headers) -> httpx2.Headers:
    """Say in the headers what this cache adds to RFC 9111, before the cache reads them.

    - No heuristic freshness: a response that does not say how long it is fresh is asked for again
      each time, with its validators, so that a changed image is never served from yesterday.
    - A missing or future Date becomes the time of receipt (RFC 9110, section 6.6.1), without which
      the response would never grow old.

    Errors and redirects are not kept, because their bodies are not read to the end.
    """
    if not _lies_in_the_past(headers.get("date", "")):
        headers["date"] = formatdate(usegmt=True)
    if status == 304:
        return headers
    control = headers.get("cache-control", "")
    if "max-age" in control.lower() or "expires" in headers:
        return headers
    addition = "no-cache" if "etag" in headers or "last-modified" in headers else "no-store"
    headers["cache-control"] = f"{control}, {addition}" if control else addition
    return headers


def _cache_key(salt: str, url: httpx2.URL) -> str:
    """Return hishel's key for a response; the length before the salt keeps two pairs from looking alike."""
    return hashlib.sha256(f"{len(salt)}:{salt}{url}".encode()).hexdigest()


def _lies_in_the_past(date: str) -> bool:
    try:
        parsed = parsedate_tz(date)
        return parsed is not None and mktime_tz(parsed) <= time.time()
    except (ValueError, OverflowError):
        return False


def _parse(reference: str) -> httpx2.URL:
    if len(reference) > _MAX_URL_LENGTH:
        raise MediaReferenceError(f"the URL is longer than {_MAX_URL_LENGTH} characters")
    try:
        url = httpx2.URL(reference)
        fault = _fault(url)
    except (httpx2.InvalidURL, ValueError):
        raise MediaReferenceError("the URL cannot be parsed") from None
    if fault is not None:
        raise MediaReferenceError(f"the URL {fault}")
    return url.copy_with(fragment=None)


def _redirected(url: httpx2.URL, response: httpx2.Response) -> httpx2.URL:
    location = response.headers.get("location", "")
    if not location or len(location) > _MAX_URL_LENGTH:
        raise MediaFetchError("the media server redirects without a usable target")
    try:
        target = url.join(location)
        fault = _fault(target)
    except (httpx2.InvalidURL, ValueError):
        raise MediaFetchError("the media server redirects without a usable target") from None
    if fault is not None:
        raise MediaForbiddenError(f"the media server redirects to a URL that {fault}")
    return target.copy_with(fragment=None)


def _fault(url: httpx2.URL) -> str | None:
    """Say what rules `url` out by its form alone, before its address is looked at."""
    if url.scheme not in {"http", "https"}:
        return "has another scheme than http or https"
    if not url.host or not 0 < (url.port or 1) < 65536:
        return "has no host or no valid port"
    if url.userinfo:
        return "has credentials in it, which are never sent; use a signed URL"
    return None


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaTooLargeError(
            f"the media server sends more than the limit of {max_bytes} bytes; use a smaller image"
        )
