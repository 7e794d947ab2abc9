"""The answers to one prompt, each taken from SGLang up to the end that SGLang reports, whoever reads them.

SGLang has no other way to say that its scheduler is done with a request. So an answer that nobody wants any
more is aborted and still taken to its end: only then may what its prompt points to become something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from trtllm_mm_cache.engines.sglang.prepare import PreparedRequest
from trtllm_mm_cache.engines.sglang.processes import RunningEngine
from trtllm_mm_cache.errors import EngineLostError

Output = Mapping[str, Any]


class Answers:
    """Choices are requests of their own to SGLang.

    The first one's prefix is in the prefix cache when the others come: they wait for its first token.
    """

    def __init__(self, engine: RunningEngine, prepared: PreparedRequest) -> None:
        self._engine = engine
        self._prepared = prepared
        self._news: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
        # SGLang aborts by prefix, and a client may send a name twice: ours are of one length and unique.
        self._names = [uuid.uuid4().hex for _ in prepared.choices]
        self._tasks: list[asyncio.Task[None]] = []

    async def outputs(self) -> AsyncGenerator[tuple[int, Output]]:
        """Yield `(choice, output)` as they come. Raises what SGLang raises, or `EngineLostError`."""
        self._engine.watch()
        if self._engine.is_lost:
            raise engine_lost()
        self._engine.when_lost.add(self._lose)
        try:
            self._begin(0)
            running = len(self._names)
            while running:
                choice, news = await self._news.get()
                if isinstance(news, Exception):
                    raise news
                if len(self._tasks) == 1:
                    for other in range(1, len(self._names)):
                        self._begin(other)
                if news is None:
                    running -= 1
                else:
                    yield choice, news
        finally:
            self._engine.when_lost.discard(self._lose)

    @property
    def ended(self) -> bool:
        """Whether SGLang has reported the end of all of them."""
        return all(task.done() for task in self._tasks)

    def abort(self) -> None:
        """Have the scheduler end what still runs; what has not reached it yet never will."""
        for name, task in zip(self._names, self._tasks, strict=False):
            state = self._engine.manager.rid_to_state.get(name)
            if state is not None and state.dispatched:
                self._engine.manager.abort_request(name)
            else:
                task.cancel()

    async def wait(self) -> None:
        """Wait until SGLang has reported the end of all of them, or has itself ended."""
        lost = asyncio.create_task(self._engine.lost())
        ending = asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            waiting: set[asyncio.Future[Any]] = {lost, ending}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
            ending.cancel()
            await asyncio.gather(lost, ending, return_exceptions=True)

    def _lose(self) -> None:
        self._news.put_nowait((0, engine_lost()))

    def _begin(self, choice: int) -> None:
        self._tasks.append(asyncio.create_task(self._take(choice), name="sglang answer"))

    async def _take(self, choice: int) -> None:
        news: Exception | None = None
        try:
            stream = await self._engine.generate(self._names[choice], self._prepared.choices[choice])
            async with contextlib.aclosing(stream):
                async for output in stream:
                    self._news.put_nowait((choice, output))
        except Exception as error:  # noqa: BLE001 - whoever reads the answers gets it
            news = error
        self._news.put_nowait((choice, news))


def engine_lost() -> EngineLostError:
    """Return the error of requests, and of a worker, whose engine has ended."""
    return EngineLostError(
        "SGLang's scheduler or another of its processes has ended, and this PD worker ends with it, to be "
        "started again; the lines above in its log say why"
    )
