"""`tensorrt_llm/executor/result.py`, 1.2 and 1.3: an answer that grows, awaited in an event loop or not."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.executor.utils import RequestError


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    """`token_ids` and `logprobs` are all tokens so far; without a request for them `logprobs` stay empty."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _last_token_ids_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]


class RequestOutput:
    """What `generate_async` returns and what iterating it gives, each time the same object."""

    def __init__(self, request_id: int, prompt_token_ids: list[int], abort: Callable[[int], None]) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput()]
        self.disaggregated_params: Any = None
        self._abort = abort
        self._aborted = False
        self._done = False
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._arrived = asyncio.Event()
        except RuntimeError:
            self._loop = None

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._abort(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def put(self, response: dict[str, Any]) -> None:
        """Take a response; called by the thread that reads from the other process."""
        self._queue.put(response)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)

    def result(self, timeout: float | None = None) -> RequestOutput:
        while not self._done:
            self._handle(self._queue.get(timeout=timeout))
        return self

    async def aresult(self) -> RequestOutput:
        async for _ in self:
            pass
        return self

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        assert self._loop is not None, "there was no event loop when the request was made"
        while self._queue.empty():
            await self._arrived.wait()
            self._arrived.clear()
        self._handle(self._queue.get_nowait())
        return self

    def _handle(self, response: dict[str, Any]) -> None:
        self._done = response["final"]
        if response.get("error") is not None:
            raise RequestError(response["error"])
        output = self.outputs[0]
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response.get("token_ids", ()))
        for entry in response.get("logprobs", ()):
            output.logprobs.append({token: Logprob(*reported) for token, reported in entry.items()})
        output.finish_reason = response.get("finish_reason")
        self.disaggregated_params = response.get("disaggregated_params")
