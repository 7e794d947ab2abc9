"""Asks PD workers for answers over Dynamo's request plane, and chooses which."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from dynamo.runtime import Client, Context
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.errors import (
    MmCacheError,
    NotAMemberError,
    OverloadedError,
    PdLostError,
    PdUnavailableError,
)
from trtllm_mm_cache.observability.metrics import gauge
from trtllm_mm_cache.runtime.adapters import AdapterDirectory
from trtllm_mm_cache.runtime.generation import HEARTBEAT_S, error_of
from trtllm_mm_cache.runtime.membership import GENERATE, PROOF_FIELD, Membership
from trtllm_mm_cache.runtime.rendezvous import rendezvous_rank

logger = logging.getLogger(__name__)

_SILENCE_S = 6 * HEARTBEAT_S
"""A worker that says nothing for so long, not even that it is there, stands still or is out of reach."""

_SPREAD = 1.25
"""Most times the mean that a worker may have under way before its items go to the next in their order."""


class PdWorkers(Collector):
    """Calls PD workers through Dynamo. For use from one event loop.

    Requests about the same items go to the same worker, whose cache has them: the home of most of their
    items by rendezvous hashing, so that every frontend finds the same one. A worker with much more under way
    than the others is passed over, and a request without items goes to the one with least. A request for an
    adapter goes to those workers alone that have it.
    """

    def __init__(self, client: Client, members: Membership, adapters: AdapterDirectory) -> None:
        self._client = client
        self._members = members
        self._adapters = adapters
        self._running: Counter[int] = Counter()

    @property
    def instances(self) -> list[int]:
        """Ids of the PD workers that are alive now, as discovery sees them."""
        return list(self._client.instance_ids())

    def collect(self) -> Iterable[Metric]:
        """Yield how many PD workers are alive."""
        yield gauge("pd_workers", "PD workers that discovery names.", len(self.instances))

    async def generate(
        self, payload: dict[str, Any], request_id: str, items: Sequence[bytes]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages of one answer; `items` are digests of what the request's media references are.

        The first message, which may be empty, says that a worker has the request; `payload` is emptied then,
        so that it does not hold the items' bytes for as long as the answer takes. Until then a worker that
        cannot be reached, does not prove itself, stands still or is full is left for another one. Raises what
        the worker reports, `PdUnavailableError` where none can take the request, `PdLostError` when a worker
        goes away in the middle. Closing it stops the worker's computation.
        """
        tried: list[int] = []
        adapter = (payload.get("routing") or {}).get("lora_name")
        while True:
            instance = self._choose(items, tried, adapter)
            tried.append(instance)
            began = False
            try:
                async with aclosing(self._call(instance, payload, request_id)) as messages:
                    async for message in messages:
                        if not began:
                            began = True
                            payload.clear()
                        yield message
            except (PdUnavailableError, OverloadedError, NotAMemberError) as error:
                if began or set(self._having(adapter)) <= set(tried):
                    raise
                logger.info("request %s goes to another PD worker: %s", request_id, error)
            else:
                return

    def _having(self, adapter: str | None) -> list[int]:
        return [each for each in self.instances if adapter is None or self._adapters.has(each, adapter)]

    def _choose(self, items: Sequence[bytes], tried: Sequence[int], adapter: str | None = None) -> int:
        left = [instance for instance in self._having(adapter) if instance not in tried]
        if not left:
            raise PdUnavailableError("no PD worker can take this request now; retry in a moment")
        if not items:
            return min(left, key=lambda instance: self._running[instance])
        ranks = [rendezvous_rank(digest, left) for digest in items]
        homes = Counter(rank[0] for rank in ranks)
        home, _ = homes.most_common(1)[0]
        order = next(rank for rank in ranks if rank[0] == home)
        most = _SPREAD * (1 + sum(self._running[instance] for instance in left)) / len(left) + 1
        return next((instance for instance in order if self._running[instance] < most), home)

    async def _call(
        self, instance: int, payload: dict[str, Any], request_id: str
    ) -> AsyncGenerator[dict[str, Any]]:
        context = Context(request_id)
        call = self._members.call(GENERATE, instance)
        self._running[instance] += 1
        ended = False
        try:
            async with asyncio.timeout(_SILENCE_S):
                sealed = payload | {PROOF_FIELD: call.proof()}
                stream = await self._client.direct(sealed, instance, context=context)
                del sealed
                first = _data(await anext(stream))
                # What a process says that has not proved itself is not believed, an error neither.
                call.check(first.get(PROOF_FIELD, first.get("error")))
            while True:
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        item = await anext(stream)
                except StopAsyncIteration:
                    break
                yield _message(item)
            ended = True
        except (MmCacheError, asyncio.CancelledError, GeneratorExit):
            raise
        except TimeoutError:
            raise PdLostError(
                f"the PD worker has said nothing for {_SILENCE_S:g} seconds; retry in a moment"
            ) from None
        except Exception as error:  # noqa: BLE001 - the runtime raises bare Exception for a lost connection
            logger.warning("PD worker %x: %s", instance, str(error).partition("\n")[0][:200])
            raise PdLostError("the PD worker cannot be reached or has gone; retry in a moment") from None
        finally:
            self._running[instance] -= 1
            if not self._running[instance]:
                del self._running[instance]  # a restarted worker has another id
            if not ended:
                context.stop_generating()


def _message(item: Any) -> dict[str, Any]:
    """Return the message of one item. Raises what it reports."""
    message = _data(item)
    if (error := error_of(message)) is not None:
        raise error
    return message


def _data(item: Any) -> dict[str, Any]:
    """Return what one item carries. Raises `ConnectionError` for what Dynamo reports in a worker's place."""
    if hasattr(item, "is_error") and item.is_error():
        raise ConnectionError("; ".join(item.comments() or ["the worker failed"]))
    data = item.data() if hasattr(item, "data") else item
    return data if isinstance(data, dict) else {}
