"""Our errors as the messages of which Dynamo's frontend makes HTTP answers.

They are yielded, as the last message of an answer: what a handler raises Dynamo 1.6.1 prints with its
traceback to standard error, for a client's mistake too, and replaces its text by the status' own.

What its frontend makes of each class, found by sending it from a worker and reading the answer:

    class             the client gets      and the worker
    InvalidRequest    400 with our text    stays in rotation
    Unavailable       503 with our text    stays in rotation
    BackendProtocol   502 with our text    stays in rotation
    Internal          500 with our text    stays in rotation
    DeadlineExceeded  504 with our text    is left out for 5 seconds

So 504 is never used: text and cached images would fail because an encode worker is slow.
"""

from __future__ import annotations

from typing import Any

from trtllm_mm_cache.errors import MmCacheError, RequestError


def as_dynamo_message(error: MmCacheError) -> dict[str, Any]:
    """Return the message that ends an answer with `error`; none may follow it."""
    text = f"{error} [{error.code}]"
    body = {
        "class": _class(error),
        "message": text,  # for logs
        "public": {"type": "message", "message": text},
    }
    return {"_dynamo_annotated": True, "event": "error", "error": body}


def _class(error: MmCacheError) -> str:
    if isinstance(error, RequestError):
        return "InvalidRequest"
    if error.retryable and error.http_status in (503, 504):
        return "Unavailable"
    return "BackendProtocol" if error.http_status == 502 else "Internal"
