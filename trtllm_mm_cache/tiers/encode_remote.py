"""The last tier: encode workers. Which one is asked, and which one after that.

The encode worker that the key chooses is asked first, and once more the next one if that can help. Those that
are not there any more, though discovery still lists them, and those whose breaker is open are passed over.
What one has ready is READ and committed as part of the same attempt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.cache.manager import Lease, Reservation
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    EncodeError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    EncodeUnreachableError,
    InvalidEmbeddingError,
    MmCacheError,
    NotAMemberError,
    TransferError,
)
from trtllm_mm_cache.observability.metrics import Step, counter, gauge, samples
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.runtime.rendezvous import rendezvous_rank
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.base import MissingItem, Receive
from trtllm_mm_cache.tiers.breaker import STATES, CircuitBreakers
from trtllm_mm_cache.transfer import Export, PeerMetadata, Reader

logger = logging.getLogger(__name__)

_ATTEMPTS = 2


class EncodeWorkers(Protocol):
    """The encode workers, as this tier sees them; `runtime.encode_client.EncodeClient` are the real ones."""

    @property
    def instances(self) -> list[int]:
        """Ids of those that are alive."""
        ...

    async def encode(
        self, instance: int, request: EncodeRequest, unwanted: Callable[[EncodeReady], None]
    ) -> EncodeReady:
        """Ask one instance for one embedding; an answer after a cancellation goes to `unwanted`."""
        ...

    async def close(self) -> None:
        """Stop waiting for answers."""
        ...


class ExportedEmbedding:
    """`Found`: an embedding that an encode worker has exported, to be READ by NIXL."""

    def __init__(self, reader: Reader, ready: EncodeReady, deadline_s: float) -> None:
        """Raises `ProtocolMismatchError` or `TransferError` for metadata that arrived damaged."""
        self.nbytes = ready.nbytes
        self.dtype = ready.dtype
        self.shape = ready.shape
        self.metadata = ready.metadata
        self._reader = reader
        self._peer = PeerMetadata.from_wire(ready.peer)
        self._export = Export(ready.token, ready.address, ready.nbytes, ready.checksum)
        self._deadline_s = deadline_s

    async def read_into(self, reservation: Reservation, *, finite: bool) -> None:
        """See `Found.read_into`."""
        await self._reader.read_into(
            reservation,
            self._peer,
            self._export,
            deadline_s=self._deadline_s,
            finite_dtype=self.dtype if finite else None,
        )

    def release(self) -> None:
        """See `Found.release`."""
        self._reader.release(self._peer, self._export.token)


class EncodeTier(Collector):
    """`Tier` over the encode workers of one deployment. For use from one event loop.

    `fingerprint` is that of the PD worker's model; `clock` counts seconds, for the breakers.
    `retries` counts second attempts since the start.
    """

    name = "encode"

    def __init__(
        self,
        workers: EncodeWorkers,
        reader: Reader,
        fingerprint: str,
        settings: PdSettings,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._reader = reader
        self._fingerprint = fingerprint
        self._settings = settings
        self.breakers = CircuitBreakers(
            failures=settings.breaker_failures, retry_s=settings.breaker_retry_s, clock=clock
        )
        self._call = Step.new(registry, "encode_call", "Step 5: asking an encode worker until its answer.")
        self.retries = 0
        for part in (self, self.breakers):
            registry.register(part)

    async def fill(self, item: MissingItem, receive: Receive) -> Lease:
        """Return a lease on the embedding of `item`, made by an encode worker.

        The first of two attempts gets half of the time, the last one what is left. Raises the last
        attempt's error, `EncodeUnavailableError` at once when no instance is alive or admitted.
        """
        ranked = rendezvous_rank(item.key.digest, self._workers.instances)
        self.breakers.keep(ranked)
        alone, left = len(ranked) == 1, _ATTEMPTS
        deadline = asyncio.get_running_loop().time() + self._settings.encode_timeout_s
        failure: MmCacheError | None = None
        try:
            for instance in ranked * _ATTEMPTS if alone else ranked:
                if not self.breakers.admits(instance):
                    continue
                if failure is not None:
                    self.retries += 1
                    logger.warning("embedding %s…: %s; trying once more", item.key.hex[:12], failure.code)
                request = self._request(item, fresh=_was_wrong(failure))
                try:
                    with self.breakers.calling(instance):
                        return await self._attempt(
                            instance, item, request, receive, deadline, 1 if alone else left
                        )
                except EncodeUnreachableError as error:
                    failure = error  # it took no time and has not seen the item: not an attempt
                except MmCacheError as error:
                    failure = error
                    left -= 1
                    if not left or not _another_attempt_helps(error, alone=alone):
                        break
            raise failure or _unavailable(ranked)
        finally:
            # The error's traceback leads to this frame, which must not lead back to the error: the two
            # would keep the item's bytes until the garbage collector runs.
            del failure

    async def close(self) -> None:
        """Stop waiting for answers that no caller wants."""
        await self._workers.close()

    def collect(self) -> Iterable[Metric]:
        """Yield retries, and which encode workers there are, with the state of their breakers."""
        yield counter("encode_retries", "Second attempts at an embedding.", self.retries)
        instances, states = self._workers.instances, self.breakers.states()
        yield gauge("encode_workers", "Encode workers in discovery.", len(instances))
        yield samples(
            GaugeMetricFamily,
            "encode_worker_live",
            "1 for each encode worker in discovery, by instance id.",
            [({"instance": f"{instance:x}"}, 1) for instance in instances],
        )
        yield samples(
            GaugeMetricFamily,
            "encode_worker_breaker",
            "1 for the state of each encode worker's breaker.",
            [
                ({"instance": f"{instance:x}", "state": state}, states.get(instance, "closed") == state)
                for instance in instances
                for state in STATES
            ],
        )

    def _request(self, item: MissingItem, *, fresh: bool) -> EncodeRequest:
        tag = item.scope.tag
        return EncodeRequest(
            fingerprint=self._fingerprint,
            key=item.key.hex,
            kind=item.description.kind,
            media=item.media,
            processor_kwargs=dict(item.description.processor_kwargs),
            variant=item.description.variant,
            retain=item.retained,
            fresh=fresh,
            salt_tag=None if tag is None else tag.hex(),
        )

    async def _attempt(
        self,
        instance: int,
        item: MissingItem,
        request: EncodeRequest,
        receive: Receive,
        deadline: float,
        left: int,
    ) -> Lease:
        seconds = (deadline - asyncio.get_running_loop().time()) / left
        # What is raised after it has no TimeoutError as context: that knows the task, and the task the error.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                with self._call.time():
                    ready = await self._workers.encode(instance, request, self._release)
                found = ExportedEmbedding(self._reader, ready, self._settings.transfer_timeout_s)
                try:
                    ready.check_answers(request)
                except MmCacheError:
                    found.release()
                    raise
                return await receive(item, found)
        raise EncodeTimeoutError(
            f"an encode worker brought no embedding within {seconds:.3g} seconds; retry later"
        )

    def _release(self, ready: EncodeReady) -> None:
        """Have the export of an answer released that no caller waits for any more."""
        with suppress(MmCacheError):  # metadata that arrived damaged: its lease times out
            ExportedEmbedding(self._reader, ready, self._settings.transfer_timeout_s).release()


def _was_wrong(failure: MmCacheError | None) -> bool:
    """Whether the embedding itself was wrong, and may lie so in the arena of whoever is asked next."""
    return isinstance(failure, (ChecksumMismatchError, EmbeddingMismatchError, InvalidEmbeddingError))


def _another_attempt_helps(error: MmCacheError, *, alone: bool) -> bool:
    """Whether to ask again: another instance, or where there is `alone` one, that one for other bytes."""
    return isinstance(error, TransferError if alone else (EncodeError, NotAMemberError, TransferError))


def _unavailable(ranked: list[int]) -> EncodeUnavailableError:
    reason = (
        "every encode worker has failed repeatedly and is passed over for now"
        if ranked
        else "no encode worker is alive, so new images cannot be encoded"
    )
    return EncodeUnavailableError(f"{reason}; text and cached images are still served; retry later")
