"""A request's body, within the memory that bodies may take together.

Nearly all bytes of a large body are base64 in data: URLs. They are cut out of the raw bytes before the JSON
is read: what is left, text and structure, has a small limit of its own, so that no body can become many times
its size as Python objects, and the images are never copied as text.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
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
"""Of a body without its large data: URLs: more text than the context of any model served today."""

_MAX_JSON_VALUES: Final = 200_000
"""Each may cost a hundred bytes and more as a Python object."""

_COPIES: Final = 3  # the body, the bytes decoded from it, the message to the PD worker
_SMALL_BYTES: Final = 64 * 1024
_CUT_FROM_BYTES: Final = 4096
_OPENING: Final = b'"data:'


class BodyMemory:
    """The memory that bodies take together: at most `request_memory_mb`. For use from one event loop.

    Small bodies are never kept waiting: text and short conversations are served while large images are on
    their way. `held_bytes` are taken now, by `waiting` none yet.
    """

    def __init__(self, settings: FrontendSettings) -> None:
        self._max_bytes = int(settings.request_memory_mb * MB)
        self._max_wait_s = settings.max_waiting_s
        self._freed = asyncio.Condition()
        self.held_bytes = self.waiting = self.refused = 0

    @asynccontextmanager
    async def hold(self, body_bytes: int) -> AsyncIterator[BodyShare]:
        """Wait for the memory of a body of so many bytes, and hold it until the block ends or gives it back.

        Raises `OverloadedError` when its turn does not come in time.
        """
        nbytes = _COPIES * body_bytes
        if body_bytes > _SMALL_BYTES:
            await self._turn(nbytes)
        self.held_bytes += nbytes
        share = BodyShare(self, nbytes)
        try:
            yield share
        finally:
            share.release()

    async def _turn(self, nbytes: int) -> None:
        self.waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s), self._freed:
                await self._freed.wait_for(
                    lambda: self.held_bytes == 0 or self.held_bytes + nbytes <= self._max_bytes
                )
        except TimeoutError:
            self.refused += 1
            raise OverloadedError(
                "too many large requests are under way; small ones are still served; retry in a moment"
            ) from None
        finally:
            self.waiting -= 1

    async def _notify(self) -> None:
        async with self._freed:
            self._freed.notify_all()


class BodyShare:
    """What one body holds of the memory."""

    def __init__(self, memory: BodyMemory, nbytes: int) -> None:
        self._memory = memory
        self._nbytes = nbytes

    def release(self) -> None:
        """Give it back: a worker has the request now. Idempotent."""
        self._memory.held_bytes -= self._nbytes
        if self._nbytes and self._memory.waiting:
            asyncio.get_running_loop().create_task(self._memory._notify())
        self._nbytes = 0


@dataclass(frozen=True)
class Body:
    """A request's JSON object, and the large data: URLs cut out of it, by the text in their place."""

    fields: dict[str, Any] = field(repr=False)
    cut: dict[str, bytes] = field(default_factory=dict, repr=False)

    def whole(self, text: str) -> str:
        """Return a text of the client's: one that is itself a long data: URL was cut out like an image's."""
        return self.cut[text].decode("ascii") if text in self.cut else text


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
    """Receive the body.

    Raises `MediaTooLargeError`, `RequestTimeoutError`, and Starlette's `ClientDisconnect`.
    """
    limit = int(settings.max_request_mb * MB)
    received = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                received += chunk
                if len(received) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeoutError(
            f"the request's body did not arrive within {settings.body_timeout_s:g} seconds"
        ) from None
    return received


async def parse_body(raw: bytearray) -> Body:
    """Read the JSON of a body, which is emptied. Raises `InvalidRequestError`."""
    if len(raw) > _SMALL_BYTES:
        return await asyncio.to_thread(_parse, raw)
    return _parse(raw)


def _parse(raw: bytearray) -> Body:
    rest, cut = _cut_data_urls(raw)
    raw.clear()
    if len(rest) > MAX_JSON_BYTES:
        raise InvalidRequestError(
            f"the request has {len(rest)} bytes besides its data: URLs in base64; at most {MAX_JSON_BYTES} "
            "are taken"
        )
    if sum(rest.count(each) for each in (b",", b"[", b"{")) > _MAX_JSON_VALUES:
        raise InvalidRequestError(f"the request has more than {_MAX_JSON_VALUES} JSON values")
    try:
        fields = from_json(bytes(rest), allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return Body(fields, cut)


def _cut_data_urls(raw: bytearray) -> tuple[bytearray, dict[str, bytes]]:
    """Return the body with each long data: URL replaced by a word of ours, and the URLs by those words.

    In JSON an unescaped quotation mark before `data:` opens a string: one that ends a string is never
    followed by a letter. What has escapes, beside the needless one of a slash, stays where it is.
    """
    nonce = secrets.token_hex(8)
    cut: dict[str, bytes] = {}
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
        word = f"cut-{nonce}-{len(cut)}"
        cut[word] = url
        rest += memoryview(raw)[copied : start + 1]
        rest += word.encode()
        copied = at = end
    rest += memoryview(raw)[copied:]
    return rest, cut


def _too_large(limit: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"the request's body is larger than {limit / MB:g} MB (--max-request-mb); send fewer or smaller "
        "images, or image URLs"
    )
