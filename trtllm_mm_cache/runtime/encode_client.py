"""Asks encode workers for embeddings over Dynamo's request plane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from dynamo.runtime import Client, Context

from trtllm_mm_cache.errors import EncodeFailedError, EncodeUnavailableError, EncodeUnreachableError
from trtllm_mm_cache.observability.traces import trace_headers
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.messages import ENCODE, EncodeReady, EncodeRequest, parse_answer

logger = logging.getLogger(__name__)

# How long an answer may come after its caller has gone. The encode worker is told, so it is soon or never.
_LATE_ANSWER_S = 30.0

# What Dynamo 1.6.1 says when a call never left: its instance is dead, but still listed for up to 10 seconds.
_NEVER_SENT = ("not found for endpoint", "TCP connection to")

Unwanted = Callable[[EncodeReady], None]


class EncodeClient:
    """Calls encode workers through Dynamo. For use from one event loop; no deadline of its own."""

    def __init__(self, client: Client, members: Membership) -> None:
        self._client = client
        self._members = members
        self._calls: set[asyncio.Task[EncodeReady]] = set()

    @property
    def instances(self) -> list[int]:
        """Ids of the encode workers that are alive now, as discovery sees them."""
        return list(self._client.instance_ids())

    async def encode(self, instance: int, request: EncodeRequest, unwanted: Unwanted) -> EncodeReady:
        """Ask `instance` for one embedding.

        Raises what the encode worker reports, `EncodeUnreachableError` when it is not there,
        `EncodeUnavailableError` when it goes away before it answers, `ProtocolMismatchError` for an
        answer of another protocol, `NotAMemberError` for one without the deployment's secret.
        Cancelling the call tells the encode worker that no caller waits any more; an answer that comes all
        the same is an export that will not be READ, and goes to `unwanted`.
        """
        # A context of its own: the flight outlives the request that started it.
        context = Context()
        call = asyncio.create_task(self._call(instance, request, context), name="encode call")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            context.stop_generating()
            call.add_done_callback(partial(_pass_on, unwanted))
            asyncio.get_running_loop().call_later(_LATE_ANSWER_S, call.cancel)
            raise
        finally:
            # An error's traceback leads to this frame, and the task to the error: see `threads.py`.
            del call, request

    async def close(self) -> None:
        """Stop waiting for answers that no caller wants."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self, instance: int, request: EncodeRequest, context: Context) -> EncodeReady:
        try:
            call = self._members.call(ENCODE, instance)
            fields = request.model_dump(exclude={"media"}) | {"trace_headers": trace_headers()}
            message = call.seal(fields, media=request.media)
            stream = await self._client.direct(message, instance, context=context)
            del request, message  # megabytes, which a call without a caller need not keep
            async for item in stream:
                return parse_answer(call.open(_data(item)))
        except (ValueError, ConnectionError) as error:
            raise _unreachable(error) from error
        except Exception as error:  # the runtime raises bare Exception for a lost connection
            if type(error) is not Exception:
                raise
            raise _unreachable(error) from error
        raise EncodeFailedError("the encode worker ended its answer without an embedding; retry")


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
