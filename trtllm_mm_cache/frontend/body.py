"""A request's body, within the memory that bodies may take together.

Nearly all bytes of a large body are base64 in data: URLs. They are cut out of the raw bytes before the JSON
is read: what is left, text and structure, has a small limit of its own, so that no body can become many times
its size as Python objects, and the images are never copied as text.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import from_json
from starlette.requests import Request

from trtllm_mm_cache.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    OverloadedError,
    RequestTimeoutError,
)
from trtllm_mm_cache.settings import MB, FrontendSettings

MAX_JSON_BYTES: Final = 4 * MB
"""Of a body without its images' data: URLs: more text than the context of any model served today."""

_MAX_JSON_VALUES: Final = 200_000
"""Each may cost a hundred bytes and more as a Python object."""

_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.?)*+(?:"|\Z)', re.DOTALL)

_COPIES: Final = 3  # the body, the bytes decoded from it, the message to the PD worker
_SMALL_BYTES: Final = 64 * 1024
_SMALL_SHARE: Final = 1 / 4
_CUT_FROM_BYTES: Final = 4096
_OPENING: Final = b'"data:'
_GRACE_S: Final = 10.0
_MIN_BYTES_A_SECOND: Final = MB / 4
"""A body that comes slower, the first seconds aside, holds memory that others wait for."""


class BodyMemory:
    """The memory that bodies take together: at most `request_memory_mb`. For use from one event loop.

    A quarter of it is for small bodies, which never wait: text and short conversations are served while large
    images are on their way, and refused when small ones alone have taken it. Large bodies come in turn, so
    that many smaller ones cannot keep one waiting. `waiting` have none yet.
    """

    def __init__(self, settings: FrontendSettings) -> None:
        self._max_bytes = int(settings.request_memory_mb * MB)
        self._max_wait_s = settings.max_waiting_s
        self._first = asyncio.Lock()
        self._freed = asyncio.Condition()
        self._held = {True: 0, False: 0}  # bytes, by whether the body is large
        self.waiting = self.refused = 0

    @property
    def held_bytes(self) -> int:
        """What the bodies under way are counted at."""
        return sum(self._held.values())

    @asynccontextmanager
    async def hold(self, body_bytes: int) -> AsyncIterator[BodyShare]:
        """Wait for the memory of a body of so many bytes, and hold it until the block ends or gives it back.

        Raises `OverloadedError` when its turn does not come in time, or too many small ones are under way.
        """
        nbytes, large = _COPIES * body_bytes, body_bytes > _SMALL_BYTES
        if large:
            await self._turn(nbytes)
        elif self._held[False] + nbytes > self._max_bytes * _SMALL_SHARE:
            self.refused += 1
            raise OverloadedError("too many requests are under way; retry in a moment")
        self._held[large] += nbytes
        share = BodyShare(self, nbytes, large=large)
        try:
            yield share
        finally:
            share.release()

    async def _turn(self, nbytes: int) -> None:
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s), self._first, self._freed:
                most = self._max_bytes * (1 - _SMALL_SHARE)
                await self._freed.wait_for(lambda: not self._held[True] or self._held[True] + nbytes <= most)
        except TimeoutError:
            self.refused += 1
            raise OverloadedError(
                "too many large requests are under way; small ones are still served; retry in a moment"
            ) from None
        finally:
            self.waiting -= 1

    def _release(self, nbytes: int, *, large: bool) -> None:
        self._held[large] -= nbytes
        if self.waiting:
            asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._freed:
            self._freed.notify_all()


class BodyShare:
    """What one body holds of the memory."""

    def __init__(self, memory: BodyMemory, nbytes: int, *, large: bool) -> None:
        self._memory = memory
        self._nbytes, self._large = nbytes, large

    def release(self) -> None:
        """Release it: a worker has the request now. Idempotent."""
        nbytes, self._nbytes = self._nbytes, 0
        if nbytes:
            self._memory._release(nbytes, large=self._large)


@dataclass(frozen=True)
class Body:
    """A request's JSON object, and its images' large data: URLs, by the words that stand in their places."""

    fields: dict[str, Any] = field(repr=False)
    cut: dict[str, bytes] = field(default_factory=dict, repr=False)


def announced_bytes(request: Request, settings: FrontendSettings) -> int:
    """Return the length of the body, by its header.

    Raises `InvalidRequestError` for a body without one or of another type, `MediaTooLargeError` above
    `max_request_mb`.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequestError("the body must be JSON: send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequestError("compressed bodies are not served; send it as it is")
    length = request.headers.get("content-length", "")
    limit = int(settings.max_request_mb * MB)
    if not length.isdecimal() or not length.isascii():
        # Chunks tell their length too late: such a body counts as the largest one.
        return limit
    if int(length) > limit:
        raise _too_large(limit)
    return int(length)


async def receive_body(request: Request, settings: FrontendSettings) -> bytearray:
    """Receive the body, at 2 Mbit/s or more after the first seconds.

    Raises `MediaTooLargeError`, `RequestTimeoutError`, and Starlette's `ClientDisconnect`.
    """
    limit = int(settings.max_request_mb * MB)
    received = bytearray()
    began = asyncio.get_running_loop().time()
    last = began + settings.body_timeout_s
    try:
        async with asyncio.timeout_at(min(last, began + _GRACE_S)) as deadline:
            async for chunk in request.stream():
                received += chunk
                if len(received) > limit:
                    raise _too_large(limit)
                deadline.reschedule(min(last, began + _GRACE_S + len(received) / _MIN_BYTES_A_SECOND))
    except TimeoutError:
        raise RequestTimeoutError(
            f"the request's body comes too slowly: {len(received)} bytes have arrived; it has "
            f"{settings.body_timeout_s:g} seconds, and less where it comes at under 2 Mbit/s"
        ) from None
    return received


async def parse_body(raw: bytearray) -> Body:
    """Read the JSON of a body, which is emptied. Raises `InvalidRequestError`."""
    if len(raw) > _SMALL_BYTES:
        return await asyncio.to_thread(_parse, raw)
    return _parse(raw)


def _parse(raw: bytearray) -> Body:
    cut = _Cut()
    rest = cut.out_of(raw)
    raw.clear()
    fields = _read(rest)
    images = {url for url in _image_urls(fields) if url in cut.urls}
    if elsewhere := cut.urls.keys() - images:
        # What looks like an image's URL is text, a name, a schema: that is not cut, and counts as text.
        _check_length(len(rest) + sum(len(cut.urls[word]) for word in elsewhere))
        fields = _read(cut.put_back(rest, images))
    return Body(fields, cut.urls)


def _read(text: bytearray | bytes) -> dict[str, Any]:
    _check_length(len(text))
    if _separators(text) > _MAX_JSON_VALUES and _separators(_STRING.sub(b"", text)) > _MAX_JSON_VALUES:
        raise InvalidRequestError(f"the request has more than {_MAX_JSON_VALUES} JSON values")
    try:
        fields = from_json(bytes(text), allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return fields


def _check_length(nbytes: int) -> None:
    if nbytes > MAX_JSON_BYTES:
        raise InvalidRequestError(
            f"the request has {nbytes} bytes besides its images' data: URLs in base64; at most "
            f"{MAX_JSON_BYTES} are taken"
        )


def _separators(text: bytearray | bytes) -> int:
    return sum(text.count(each) for each in (b",", b"[", b"{"))


def _image_urls(fields: dict[str, Any]) -> Iterator[str]:
    messages = fields.get("messages")
    for message in messages if isinstance(messages, list) else ():
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(url, str):
                yield url


class _Cut:
    """Long data: URLs cut out of one body: `urls` by the words in their places, which no client can guess."""

    def __init__(self) -> None:
        self.urls: dict[str, bytes] = {}
        self._prefix = f"cut-{secrets.token_hex(8)}-"

    def out_of(self, raw: bytearray) -> bytearray:
        """Return the body with each long data: URL replaced by a word.

        In JSON an unescaped quotation mark before `data:` opens a string: one that ends a string is never
        followed by a letter. What has escapes, beside the needless one of a slash, stays where it is.
        """
        rest, copied, at = bytearray(), 0, 0
        while (start := raw.find(_OPENING, at)) >= 0:
            end = raw.find(b'"', start + 1)
            if end < 0:
                break
            at = start + len(_OPENING)
            if end - start < _CUT_FROM_BYTES or raw[start - 1 : start] == b"\\":
                continue
            url = bytes(memoryview(raw)[start + 1 : end])
            if b"\\" in url:
                url = url.replace(b"\\/", b"/")
            if b"\\" in url or not url.isascii():
                continue
            word = f"{self._prefix}{len(self.urls)}"
            self.urls[word] = url
            rest += memoryview(raw)[copied : start + 1]
            rest += word.encode()
            copied = at = end
        rest += memoryview(raw)[copied:]
        return rest

    def put_back(self, rest: bytearray, images: set[str]) -> bytes:
        """Return `rest` with all URLs but those of `images` in their places again."""

        def url(word: re.Match[bytes]) -> bytes:
            name = word[0].decode()
            return word[0] if name in images else self.urls.pop(name)

        return re.sub(self._prefix.encode() + rb"\d+", url, rest)


def _too_large(limit: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"the request's body is larger than {limit / MB:g} MB (--max-request-mb); send fewer or smaller "
        "images, or image URLs"
    )
