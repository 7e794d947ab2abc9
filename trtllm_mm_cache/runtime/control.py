"""The control endpoint beside a worker's own: drops embeddings on demand and hands out the metrics.

Every worker serves it as `control` in its component, next to `generate` or `encode`, behind the same guard:
it answers members of the deployment alone (`membership.py`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
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
    """Asks to drop one key, what was stored under one salt (by its tag), or everything.

    Waits up to `deadline_s` seconds for embeddings that were on their way.
    """

    version: Literal[2] = PROTOCOL_VERSION
    command: Literal["drop"] = "drop"
    key: HexDigest | None = None
    tag: SaltTag | None = None
    everything: bool = False
    deadline_s: float = Field(10.0, ge=0, le=600)

    @model_validator(mode="after")
    def _one_of_three(self) -> DropRequest:
        if (self.key is not None) + (self.tag is not None) + self.everything != 1:
            raise ValueError("give one of key, tag and everything")
        return self

    @property
    def selection(self) -> Selection:
        """What it selects, in the cache's terms."""
        return Selection(self.key, None if self.tag is None else bytes.fromhex(self.tag))


class DropReport(Message):
    """Says what one worker dropped.

    `entries` of `nbytes` bytes became invisible, `media` fetched image files were forgotten, and
    `under_way` embeddings that the drop concerns were still on their way at the deadline: they are not
    retained here, but an encode worker may still store them.
    """

    version: Literal[2] = PROTOCOL_VERSION
    entries: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    media: int = Field(0, ge=0)
    under_way: int = Field(0, ge=0)


class MetricsRequest(Message):
    """Asks for the worker's own metrics."""

    version: Literal[2] = PROTOCOL_VERSION
    command: Literal["metrics"] = "metrics"


class MetricsReport(Message):
    """The worker's own metrics, as Prometheus text."""

    version: Literal[2] = PROTOCOL_VERSION
    text: str


class Control:
    """Answers control requests: `drop` drops, `render` returns the metrics. For use from one event loop."""

    def __init__(
        self, drop: Callable[[DropRequest], Awaitable[DropReport]], render: Callable[[], str]
    ) -> None:
        self._drop = drop
        self._render = render

    async def handle(self, payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
        """Answer one request with one message: a report, or an `EncodeFault` that says what was wrong."""
        try:
            yield (await self._answer(payload)).model_dump()
        except MmCacheError as error:
            logger.warning("control %s: %s: %s", context.id(), error.code, error)
            yield EncodeFault.of(error).model_dump()

    async def _answer(self, payload: Any) -> Message:
        if isinstance(payload, dict) and payload.get("command") == "metrics":
            parse(MetricsRequest, payload)
            return MetricsReport(text=self._render())
        request = parse(DropRequest, payload)
        report = await self._drop(request)
        logger.info(
            "dropped %d entries of %d bytes and %d fetched files (%s)",
            report.entries,
            report.nbytes,
            report.media,
            "everything" if request.everything else "one key" if request.key else "one salt",
        )
        return report
