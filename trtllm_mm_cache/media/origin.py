"""One request to a media server at a time: connections, directly or through the operator's proxy.

No client object stands on top of the connections, because everything it would add (cookies, credentials and
proxies from the environment, redirects of its own, URLs in logs) must not happen here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from traceback import clear_frames
from typing import Any

import httpcore2
import httpx2

from trtllm_mm_cache.errors import MediaFetchError, MediaTooLargeError
from trtllm_mm_cache.media.network import GuardedBackend, Resolver, SystemResolver, refuse_by_name
from trtllm_mm_cache.settings import MediaSettings

_HEADERS = {
    "accept": "image/*",
    # Images are compressed already, and a coding on top is one more thing that can explode. A server
    # that codes all the same is decoded, within the size limit.
    "accept-encoding": "identity",
    "user-agent": "trtllm-mm-cache",
}


class MediaServers:
    """Connections to media servers, kept open for 30 s and used again. Belongs to one event loop.

    With `settings.media_proxy` every request goes to that proxy and none anywhere else: it resolves names and
    judges where they lead; an address in a URL, or a name of this machine, is judged here all the same.
    `resolver` replaces the system's name resolution where there is no proxy.
    """

    def __init__(self, settings: MediaSettings, max_bytes: int, resolver: Resolver | None) -> None:
        self._max_bytes = max_bytes
        self._allow_private = settings.allow_private_addresses
        connect, total = settings.connect_timeout_s, settings.media_timeout_s
        self._timeouts = {"connect": connect, "read": total, "write": total, "pool": total}
        self._system_resolver = SystemResolver()
        backend = GuardedBackend(resolver or self._system_resolver, allow_private=self._allow_private)
        self._proxied = settings.media_proxy is not None
        self._pool = _pool(settings, backend)

    async def get(self, url: httpx2.URL, conditions: Mapping[str, str]) -> httpx2.Response:
        """Send one GET; return the response once its head is there. The caller closes it.

        Reading its body raises `MediaTooLargeError` at the size limit. Raises httpcore's errors besides
        `MediaForbiddenError` and `MediaFetchError`.
        """
        if self._proxied:
            refuse_by_name(url.raw_host.decode("ascii"), allow_private=self._allow_private)
        request = httpx2.Request("GET", url, headers={**_HEADERS, **conditions})
        try:
            answer = await self._pool.handle_async_request(
                httpcore2.Request(
                    method="GET",
                    url=httpcore2.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                    ),
                    headers=request.headers.raw,
                    extensions={"timeout": self._timeouts},
                )
            )
        except (httpcore2.ProxyError, httpcore2.ConnectError) as error:
            clear_frames(error.__traceback__)  # see `HttpFetcher.fetch`
            raise MediaFetchError(f"{self.name} cannot be reached") from error
        return httpx2.Response(
            answer.status, headers=answer.headers, stream=_BoundedStream(answer, self._max_bytes)
        )

    @property
    def name(self) -> str:
        """Who answers, for a message."""
        return "the media server, or the proxy before it," if self._proxied else "the media server"

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.aclose()
        self._system_resolver.close()


class _BoundedStream(httpx2.AsyncByteStream):
    """A body as it comes from the wire, cut off with an error at the size limit."""

    def __init__(self, answer: httpcore2.Response, max_bytes: int) -> None:
        self._answer = answer
        self._max_bytes = max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in self._answer.aiter_stream():
            received += len(chunk)
            check_size(received, self._max_bytes)
            yield chunk

    async def aclose(self) -> None:
        await self._answer.aclose()


def check_size(size: int, max_bytes: int) -> None:
    """Raise `MediaTooLargeError` for more than `max_bytes`."""
    if size > max_bytes:
        raise MediaTooLargeError(
            f"the media server sends more than the limit of {max_bytes} bytes; use a smaller image"
        )


def _pool(settings: MediaSettings, backend: GuardedBackend) -> httpcore2.AsyncConnectionPool:
    """Return the pool of connections, none of them open yet. Nothing of the environment's proxies is read."""
    limits: dict[str, Any] = {
        "ssl_context": httpx2.create_ssl_context(),
        "max_connections": settings.max_fetches,
        "max_keepalive_connections": 16,
        "keepalive_expiry": 30.0,
    }
    if settings.media_proxy is None:
        return httpcore2.AsyncConnectionPool(network_backend=backend, **limits)
    proxy = httpx2.Proxy(settings.media_proxy.get_secret_value())
    return httpcore2.AsyncHTTPProxy(
        proxy_url=httpcore2.URL(
            scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=b"/"
        ),
        proxy_auth=proxy.raw_auth,
        proxy_ssl_context=limits["ssl_context"] if proxy.url.scheme == "https" else None,
        **limits,
    )
