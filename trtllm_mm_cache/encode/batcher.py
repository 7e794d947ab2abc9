"""Micro-batches: items of different requests share one run of the vision tower."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.errors import EncodeFailedError, MmCacheError
from trtllm_mm_cache.observability.metrics import BATCH_ITEMS, STEP_SECONDS, counter, gauge, histogram

logger = logging.getLogger(__name__)

EncodeBatch = Callable[[Sequence[Any]], list[EncodedItem | MmCacheError]]


@dataclass(frozen=True)
class BatchedItem:
    """One item's result. `encode_seconds` is its even share of its batch's time in the tower."""

    item: EncodedItem
    encode_seconds: float


@dataclass(eq=False)
class _Waiting:
    prepared: Any
    result: asyncio.Future[BatchedItem]
    since: float


class MicroBatcher(Collector):
    """Runs `encode` over preprocessed items, one batch at a time, in its own thread.

    An idle tower starts at once with what is there; what comes while it runs is the next batch, of at most
    `max_items`. How many may wait is for the caller to bound. For use from one event loop.

    `batches`, `items` and `failures` count since the start.
    """

    def __init__(self, encode: EncodeBatch, *, max_items: int, registry: CollectorRegistry) -> None:
        self._encode = encode
        self._max_items = max_items
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vision-tower")
        self.batches = self.items = self.failures = 0
        self._queue_wait = histogram(
            registry, "encode_queue_wait_seconds", "An image's wait for the vision tower.", STEP_SECONDS
        )
        self._seconds = histogram(
            registry,
            "encode_seconds",
            "An image's share of its batch's time in the vision tower.",
            STEP_SECONDS,
        )
        self._batch_items = histogram(
            registry, "encode_batch_images", "Images in one run of the vision tower.", BATCH_ITEMS
        )
        registry.register(self)

    @property
    def queued(self) -> int:
        """Items that wait for the tower."""
        return len(self._waiting)

    async def submit(self, prepared: Any) -> BatchedItem:
        """Encode one preprocessed item.

        Raises the item's own error. A caller that is cancelled while its item waits takes it out of the
        queue; once in the tower it runs on.
        """
        if self._closed:
            raise _closing()
        entry = _Waiting(prepared, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.append(entry)
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="micro-batcher")
        try:
            return await entry.result
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
            # An error's traceback leads to this frame, and the entry's future to the error: see `in_thread`.
            del entry, prepared

    async def close(self) -> None:
        """Stop; items that still wait get `EncodeFailedError`. The batch in the tower is waited for."""
        self._closed = True
        for entry in self._waiting:
            if not entry.result.done():
                entry.result.set_exception(_closing())
        self._waiting.clear()
        if self._running is not None:
            await asyncio.wait({self._running})
        await asyncio.to_thread(self._thread.shutdown)

    def collect(self) -> Iterable[Metric]:
        """Yield what has been encoded and what waits."""
        yield counter("encodes", "Images through the vision tower.", self.items)
        yield counter("encode_failures", "Images the vision tower failed on.", self.failures)
        yield counter("encode_batches", "Runs of the vision tower.", self.batches)
        yield gauge("encode_queue", "Images waiting for the tower.", self.queued)

    async def _run(self) -> None:
        """Run batches until no item waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._max_items], self._waiting[self._max_items :]
                started = time.perf_counter()
                self._batch_items.observe(len(batch))
                for entry in batch:
                    self._queue_wait.observe(started - entry.since)
                results = await loop.run_in_executor(
                    self._thread, self._encode_all, [entry.prepared for entry in batch]
                )
                self._deliver(batch, results, (time.perf_counter() - started) / len(batch))
                del batch, results
        finally:
            self._running = None

    def _encode_all(self, prepared: list[Any]) -> list[EncodedItem | MmCacheError]:
        """Run the tower. What it raises becomes one error for each caller: a shared one collects frames."""
        try:
            results = self._encode(prepared)
        except MmCacheError as error:
            return [type(error)(error.message) for _ in prepared]
        except Exception as error:
            # Logged here and not passed on: a result that led to its traceback, and so to the frame of the
            # executor that holds the results, would keep the batch until the cyclic collector runs.
            logger.exception("the vision tower failed on a batch of %d images", len(prepared))
            text = f"the vision tower failed: {type(error).__name__}"
            return [EncodeFailedError(text) for _ in prepared]
        if len(results) != len(prepared):
            text = f"the vision tower gave {len(results)} results for {len(prepared)} images"
            return [EncodeFailedError(text) for _ in prepared]
        return results

    def _deliver(
        self, batch: list[_Waiting], results: list[EncodedItem | MmCacheError], seconds: float
    ) -> None:
        self.batches += 1
        for entry, result in zip(batch, results, strict=True):
            if isinstance(result, MmCacheError):
                self.failures += 1
                if not entry.result.done():
                    entry.result.set_exception(result)
                continue
            self.items += 1
            self._seconds.observe(seconds)
            if not entry.result.done():
                entry.result.set_result(BatchedItem(result, seconds))


def _closing() -> EncodeFailedError:
    return EncodeFailedError("the encode worker is shutting down; retry")
