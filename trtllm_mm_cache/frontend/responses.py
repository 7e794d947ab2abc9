"""HTTP answers as ASGI messages: JSON, errors, and streams of events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.types import Send

from trtllm_mm_cache.errors import MmCacheError, RequestError

RETRY_AFTER_S: Final = 1
"""What a client is told to wait; failures of workers are repaired in about as long."""

CACHE_HEADER: Final = "x-mm-cache"
"""How many of the request's distinct items were cached: `hits=1, misses=2`."""

ItemCounts = Mapping[str, int]
"""What a PD worker says of a request's items: `hits`, `misses`, and `hit_rows`."""

_COUNTED: Final = ("hits", "misses")


def status_of(error: MmCacheError) -> int:
    """Return the HTTP status: a client's own mistake has the error's, all else is 503.

    So a client that knows nothing of this server repeats what is not its fault, and nothing else.
    """
    return error.http_status if isinstance(error, RequestError) else 503


def error_object(error: MmCacheError) -> dict[str, Any]:
    """Return the body of an error, in OpenAI's form; its text is the error's own."""
    mine = not isinstance(error, RequestError)
    name, colon, _ = error.message.partition(":")
    names_field = bool(colon) and error.item_index is None and " " not in name
    return {
        "error": {
            "message": str(error),
            "type": "server_error" if mine else "invalid_request_error",
            "param": name if names_field and not mine else None,
            "code": error.code,
        }
    }


class Reply:
    """What one client is sent: a whole answer, or server-sent events as OpenAI's clients read them."""

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._headers = headers
        self._begun = False

    async def json(self, status: int, content: Any, *, items: ItemCounts | None = None) -> None:
        """Send one whole answer: `content`, or what `json_in_steps` made of it."""
        body = content if isinstance(content, bytes) else _dumps(content)
        self._headers |= {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, items)
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, content: Any, *, items: ItemCounts | None = None) -> None:
        """Send one event; the first one commits status 200."""
        if not self._begun:
            self._headers |= {"content-type": "text/event-stream", "cache-control": "no-cache"}
            await self._start(200, items)
        body = b"data: " + _dumps(content) + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """Send what ends a whole stream."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def error(self, error: MmCacheError) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun."""
        if self._begun:
            await self.event(error_object(error))
            await self._send({"type": "http.response.body", "body": b""})
            return
        if error.retryable:
            self._headers["retry-after"] = str(RETRY_AFTER_S)
        await self.json(status_of(error), error_object(error))

    async def _start(self, status: int, items: ItemCounts | None) -> None:
        self._begun = True
        if items and any(items.get(name) for name in _COUNTED):  # of a text there is nothing to say
            self._headers[CACHE_HEADER] = ", ".join(f"{name}={items.get(name, 0)}" for name in _COUNTED)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _dumps(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
