"""Asks encode workers for embeddings over Dynamo's request plane."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from dynamo.runtime import Client, Context

from trtllm_mm_cache.errors import EncodeFailedError, EncodeUnavailableError, EncodeUnreachableError
from trtllm_mm_cache.observability.traces import trace_headers
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.messages import ENCODE, EncodeCancel, EncodeReady, EncodeRequest, parse_answer

logger = logging.getLogger(__name__)

# How long an answer may come after its caller has gone. The encode worker is told, so it is soon or never.
_LATE_ANSWER_S = 30.0

# Calls that are being sent to one encode worker at a time: until it has it, each is copies of a file.
_SENDING = 4

# What Dynamo 1.6.1 says when a call never left: its instance is dead, but still listed for up to 10 seconds.
_NEVER_SENT = ("not found for endpoint", "TCP connection to")

T = TypeVar("T")
Unwanted = Callable[[EncodeReady], None]


class _Call:
    """One call: its context, and whether anything of it may have left this process."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        # One of its own: the flight outlives the request that started it.
        self.context = Context(uuid.uuid4().hex)
        self.sent = False


class EncodeClient:
    """Calls encode workers through Dynamo. For use from one event loop; no deadline of its own.

    A few calls are sent to each encode worker at a time, so that many images at once take little memory on
    their way, here and there.
    """

    def __init__(self, client: Client, members: Membership) -> None:
        self._client = client
        self._members = members
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns: dict[int, asyncio.Semaphore] = {}

    @property
    def instances(self) -> list[int]:
        """Ids of the encode workers that are alive now, as discovery sees them."""
        return list(self._client.instance_ids())

    async def encode(self, instance: int, request: EncodeRequest, unwanted: Unwanted) -> EncodeReady:
        """Ask `instance` for one embedding.

        Raises what the encode worker reports, `EncodeUnreachableError` when it is not there,
        `EncodeUnavailableError` when it goes away before it answers, `ProtocolMismatchError` for an
        answer of another protocol, `NotAMemberError` for one without the deployment's secret.
        Cancelling the call takes it back at the encode worker; an answer that comes all the same is an export
        that will not be READ, and goes to `unwanted`.
        """
        call = _Call(instance)
        answer = self._begin(self._call(call, request))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(partial(_pass_on, unwanted))
            if not call.sent:
                answer.cancel()
            elif not answer.done():
                self._begin(self._take_back(call, answer))
            raise
        finally:
            # An error's traceback leads to this frame, and the task to the error: see `threads.py`.
            del answer, request

    async def close(self) -> None:
        """Stop waiting for answers that no caller wants."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, call: _Call, request: EncodeRequest) -> EncodeReady:
        try:
            sealing = self._members.call(ENCODE, call.instance)
            async with self._turn(call.instance):
                call.sent = True
                fields = request.model_dump(exclude={"media"}) | {"trace_headers": trace_headers()}
                message = sealing.seal(fields, media=request.media)
                stream = await self._client.direct(message, call.instance, context=call.context)
                del request, message  # megabytes, which a call without a caller need not keep
            async for item in stream:
                return parse_answer(sealing.open(_data(item)))
        except (ValueError, ConnectionError) as error:
            raise _unreachable(error) from error
        except Exception as error:  # the runtime raises bare Exception for a lost connection
            if type(error) is not Exception:
                raise
            raise _unreachable(error) from error
        raise EncodeFailedError("the encode worker ended its answer without an embedding; retry")

    async def _take_back(self, call: _Call, answer: asyncio.Task[EncodeReady]) -> None:
        """Tell the encode worker that no caller waits any more, and see to it that the call ends."""
        try:
            cancel = EncodeCancel(cancel=call.context.id()).model_dump()
            message = self._members.call(ENCODE, call.instance).seal(cancel)
            async for _ in await self._client.direct(message, call.instance, context=Context()):
                pass
            await asyncio.wait({answer}, timeout=_LATE_ANSWER_S)
        except Exception as error:  # noqa: BLE001 - the runtime raises bare Exception for a lost connection
            logger.debug("a call could not be taken back: %s", error)
        finally:
            if not answer.done():
                call.context.stop_generating()
                answer.cancel()

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name="encode call")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _turn(self, instance: int) -> asyncio.Semaphore:
        for gone in self._turns.keys() - set(self.instances):
            del self._turns[gone]
        return self._turns.setdefault(instance, asyncio.Semaphore(_SENDING))


def _pass_on(unwanted: Unwanted, call: asyncio.Task[EncodeReady]) -> None:
    if not call.cancelled() and call.exception() is None:
        unwanted(call.result())


def _data(item: Any) -> Any:
    return item.data() if hasattr(item, "data") else item


def _unreachable(error: Exception) -> EncodeUnavailableError:
    text = str(error)
    logger.warning("encode worker unreachable: %s", text.splitlines()[0][:200] if text else error)
    if any(words in text for words in _NEVER_SENT):
        return EncodeUnreachableError("the encode worker for this image is not there; retry in a moment")
    return EncodeUnavailableError("the encode worker for this image cannot be reached; retry in a moment")
