"""What our frontend and a PD worker say to each other beyond the form of Dynamo's own frontend.

A request of ours carries a `FrontendMark` in `extra_args`. The PD worker then answers with these messages, of
which a request of Dynamo's frontend gets the second kind alone:

    {"membership": ...}     first: the worker's proof that it belongs to the deployment (`membership`)
    {}                      every `HEARTBEAT_S` seconds, so that a worker that stands still is noticed
    {"token_ids": ...}      tokens, in the form of a Dynamo worker
    {"items": ...}          once, before the first token: how the request's items were found
    {"engine_data": ...}    the prompt's log probabilities, where they were asked for, in pieces
    {"error": ...}          last, instead of an exception, whose status and text Dynamo would replace
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_mm_cache.errors import MmCacheError, from_wire

HEARTBEAT_S: Final = 2.0
MARK: Final = "mm_cache"


class FrontendMark(BaseModel):
    """Says that the asker is our frontend. `trace_headers` are its span (W3C trace context)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    trace_headers: dict[str, str] = Field(default_factory=dict, max_length=2)

    @classmethod
    def of(cls, payload: Any) -> FrontendMark | None:
        """Return the mark of a request; None where there is none, or none of this version."""
        extra = payload.get("extra_args") if isinstance(payload, dict) else None
        mark = extra.get(MARK) if isinstance(extra, dict) else None
        try:
            return None if mark is None else cls.model_validate(mark)
        except ValidationError:
            return None


def error_message(error: MmCacheError) -> dict[str, Any]:
    """Return the last message of an answer that failed."""
    return {"error": {"code": error.code, "message": str(error), "item": error.item_index}}


def error_of(message: Mapping[str, Any]) -> MmCacheError | None:
    """Return the error that a message reports, or None; its text names the item already."""
    reported = message.get("error")
    return from_wire(reported) if isinstance(reported, dict) else None


@contextmanager
def heartbeats(emit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Emit an empty message every `HEARTBEAT_S` seconds while the block runs in the event loop."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def beat() -> None:
        emit({})
        timers[:] = [loop.call_later(HEARTBEAT_S, beat)]

    timers += [loop.call_later(HEARTBEAT_S, beat)]
    try:
        yield
    finally:
        timers[0].cancel()
