"""Threads for a tier's blocking calls: a few, with deadlines, some of which may never come back.

A read from a dead disk or a frozen store cannot be cancelled. Whoever waits for it goes on at its deadline;
the thread stays where it is and keeps its slot until it comes back, so that no number of requests makes more
than `threads` of them. While none is free, calls wait for their turn; while all are stuck, they fail at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.threads import shielded
from trtllm_mm_cache.tiers.storage import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SlotTimeoutError(StorageError):
    """A call has not ended within its deadline; its thread is still inside."""

    code = "tier_timeout"


class NoSlotError(Exception):
    """Every thread is stuck, or busy for too long: nothing was asked of the storage."""


class Slots:
    """`threads` threads named after `name`. For use from one event loop.

    They are daemons: one that is stuck does not keep the process from ending.
    """

    def __init__(self, name: str, threads: int, *, turn_s: float) -> None:
        self._threads = threads
        self._turn_s = turn_s
        self._free = threads
        self._stuck = 0
        self._turns: deque[asyncio.Future[bool]] = deque()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"tier-{name}-{number}", daemon=True).start()

    @property
    def stuck(self) -> int:
        """Threads that are past the deadline of their call."""
        return self._stuck

    async def run(
        self,
        work: Callable[[], T],
        *,
        deadline_s: float,
        leave: Callable[[], None] = lambda: None,
        late: Callable[[Future[T]], None] = lambda _: None,
    ) -> T:
        """Return what `work` returns on a thread.

        When this raises before the thread is done (`SlotTimeoutError`, `CancelledError`), it calls `leave`,
        and later `late` with the thread's outcome, on the thread: what the work writes to is in use until
        then. Raises `NoSlotError`, with nothing begun, when no thread is free within the time for a turn, or
        all are stuck; else what `work` raises.
        """
        await self._turn()
        outcome = self._begin(work, deadline_s)
        try:
            with suppress(TimeoutError):  # no context for what is raised below: it knows the task
                async with asyncio.timeout(deadline_s):
                    return await shielded(outcome)
            raise SlotTimeoutError(f"a tier has not answered within {deadline_s:.3g} s")  # noqa: TRY301
        except (SlotTimeoutError, asyncio.CancelledError):
            leave()
            outcome.add_done_callback(late)
            raise
        finally:
            del outcome  # it has the error, whose traceback leads to this frame

    def close(self) -> None:
        """Let idle threads end, and busy ones when they come back."""
        for _ in range(self._threads):
            self._jobs.put(None)

    async def _turn(self) -> None:
        if self._stuck == self._threads:
            raise NoSlotError("every thread of the tier is stuck in a call")
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._turn_s):
                    if await asyncio.shield(turn):
                        return
            raise NoSlotError("every thread of the tier is busy")  # noqa: TRY301
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.result():
                self._release()  # it was this call's turn just now
            turn.cancel()
            raise

    def _begin(self, work: Callable[[], T], deadline_s: float) -> Future[T]:
        loop, outcome = asyncio.get_running_loop(), Future[T]()
        state = _Running()
        overdue = loop.call_later(deadline_s, self._overdue, state)

        def ended() -> None:
            overdue.cancel()
            state.ended = True
            self._stuck -= state.stuck
            self._release()

        def told(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(ended)

        outcome.add_done_callback(told)
        self._jobs.put(partial(_perform, work, outcome))
        return outcome

    def _overdue(self, state: _Running) -> None:
        if state.ended:
            return
        state.stuck = True
        self._stuck += 1
        if self._stuck == self._threads:
            while self._turns:
                self._pass_on(self._turns.popleft(), turn=False)

    def _release(self) -> None:
        while self._turns:
            if self._pass_on(self._turns.popleft(), turn=True):
                return
        self._free += 1

    @staticmethod
    def _pass_on(waiting: asyncio.Future[bool], *, turn: bool) -> bool:
        if waiting.done():
            return False
        waiting.set_result(turn)
        return True

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it has read belongs to whoever asked


class _Running:
    """One call: whether it has ended, and whether it was past its deadline before."""

    __slots__ = ("ended", "stuck")

    def __init__(self) -> None:
        self.ended = self.stuck = False


def _perform(work: Callable[[], Any], outcome: Future[Any]) -> None:
    try:
        result = work()
    except MmCacheError as error:
        outcome.set_exception(error)
    except BaseException as error:
        logger.exception("a call of a tier failed in a way that it does not know")
        failure = StorageError(f"a tier failed ({type(error).__name__}); its log has more")
        failure.__cause__ = error
        outcome.set_exception(failure)
    else:
        outcome.set_result(result)
    finally:
        del outcome  # it has the error, whose traceback leads to this frame
