"""Which http(s) URLs are fetched, by their form alone; where they lead is judged when connecting."""

from __future__ import annotations

import httpx2

from trtllm_mm_cache.errors import MediaFetchError, MediaForbiddenError, MediaReferenceError

_MAX_URL_LENGTH = 8192


def parse_url(reference: str) -> httpx2.URL:
    """Return a client's http(s) reference without its fragment; raises `MediaReferenceError`."""
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


def redirected(url: httpx2.URL, location: str) -> httpx2.URL:
    """Return where `url` is redirected to by the `location` that its server names.

    Raises `MediaFetchError` for what is no URL, `MediaForbiddenError` for one that is not fetched.
    """
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
    if url.scheme not in {"http", "https"}:
        return "has another scheme than http or https"
    if not url.host or not 0 < (url.port or 1) < 65536:
        return "has no host or no valid port"
    if url.userinfo:
        return "has credentials in it, which are never sent; use a signed URL"
    return None
