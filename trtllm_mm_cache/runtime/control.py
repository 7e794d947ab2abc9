"""The control endpoint beside a worker's own: drops embeddings on demand, and says what adapters it has.

Every worker serves it as `control` in its component, next to `generate` or `encode`, behind the same guard:
it answers members of the deployment alone (`membership.py`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.runtime.connect import endpoint_path
from trtllm_mm_cache.runtime.messages import PROTOCOL_VERSION, EncodeFault, HexDigest, Message, SaltTag, parse
from trtllm_mm_cache.runtime.streaming import RequestContext

logger = logging.getLogger(__name__)

CONTROL: Final = "control"
"""The purpose of these calls, for `membership`."""


def control_path(endpoint_url: str) -> str:
    """Return the control endpoint beside a worker's own, as namespace.component.control."""
    namespace, component, _ = endpoint_path(endpoint_url).split(".")
    return f"{namespace}.{component}.control"


class DropRequest(Message):
    """Asks to drop one key, what was stored under one salt (by its tag), what was made of one image (by
    the digest of its content), or everything.

    Waits up to `deadline_s` seconds for embeddings that were on their way. With `bar_s` the worker retains
    nothing of what is selected for so many seconds, or until the next such request: a drop of several workers
    asks each more than once.
    """

    version: Literal[2] = PROTOCOL_VERSION
    command: Literal["drop"] = "drop"
    key: HexDigest | None = None
    tag: SaltTag | None = None
    content: HexDigest | None = None
    everything: bool = False
    deadline_s: float = Field(10.0, ge=0, le=600)
    bar_s: float = Field(0.0, ge=0, le=3600)

    @model_validator(mode="after")
    def _one_of_four(self) -> DropRequest:
        if sum(each is not None for each in (self.key, self.tag, self.content)) + self.everything != 1:
            raise ValueError("give one of key, tag, content and everything")
        return self

    @property
    def selection(self) -> Selection:
        """What it selects, in the cache's terms."""
        return Selection(self.key, _bytes(self.tag), _bytes(self.content))

    @property
    def what(self) -> str:
        """What it selects, in words."""
        if self.everything:
            return "everything"
        return "one key" if self.key else "one image" if self.content else "one salt"


class DropReport(Message):
    """Says what one worker dropped.

    `entries` of `nbytes` bytes became invisible, `stored` entries of `stored_bytes` bytes were removed from
    its disk and store, `media` fetched image files were forgotten, and `under_way` embeddings that the drop
    concerns were still on their way at the deadline: they are not retained here, but an encode worker may
    still store them.
    """

    version: Literal[2] = PROTOCOL_VERSION
    entries: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    media: int = Field(0, ge=0)
    under_way: int = Field(0, ge=0)
    stored: int = Field(0, ge=0)
    stored_bytes: int = Field(0, ge=0)


class AdaptersRequest(Message):
    """Asks which LoRA adapters a PD worker has."""

    version: Literal[2] = PROTOCOL_VERSION
    command: Literal["adapters"] = "adapters"


class AdaptersReport(Message):
    """Names the adapters that requests to a worker may give as `routing.lora_name`."""

    version: Literal[2] = PROTOCOL_VERSION
    adapters: tuple[str, ...]


class Control:
    """Answers control requests: `drop` drops, `adapters` are named. For use from one event loop."""

    def __init__(
        self, drop: Callable[[DropRequest], Awaitable[DropReport]], adapters: Sequence[str] = ()
    ) -> None:
        self._drop = drop
        self._adapters = AdaptersReport(adapters=tuple(adapters))

    async def handle(self, payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
        """Answer one request with one message: a report, or an `EncodeFault` that says what was wrong."""
        try:
            yield (await self._answer(payload)).model_dump()
        except MmCacheError as error:
            logger.warning("control %s: %s: %s", context.id(), error.code, error)
            yield EncodeFault.of(error).model_dump()

    async def _answer(self, payload: Any) -> DropReport | AdaptersReport:
        if isinstance(payload, dict) and payload.get("command") == "adapters":
            parse(AdaptersRequest, payload)
            return self._adapters
        request = parse(DropRequest, payload)
        report = await self._drop(request)
        logger.info(
            "dropped %d entries of %d bytes, %d in tiers and %d fetched files (%s)",
            report.entries,
            report.nbytes,
            report.stored,
            report.media,
            request.what,
        )
        return report


def _bytes(digits: str | None) -> bytes | None:
    return None if digits is None else bytes.fromhex(digits)
