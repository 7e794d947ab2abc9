"""Micro-batches: images of different requests share one run of the vision tower."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.encode.metrics import EncodeMetrics
from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.errors import EncodeFailedError, EncodeOverloadedError, MmCacheError

EncodeBatch = Callable[[Sequence[Any]], list[EncodedItem | MmCacheError]]


@dataclass(frozen=True)
class BatchedItem:
    """One image's result. `encode_seconds` is its even share of its batch's time in the tower."""

    image: EncodedItem
    encode_seconds: float


@dataclass(frozen=True)
class BatcherStatistics:
    """A snapshot; all counts since start except `queued`."""

    queued: int
    batches: int
    images: int
    failures: int


@dataclass(eq=False)
class _Waiting:
    item: Any
    result: asyncio.Future[BatchedItem]
    since: float


class MicroBatcher:
    """Collects preprocessed images and runs `encode` over them, one batch at a time, in its own thread.

    A batch starts when it holds `max_images`, or `max_wait_s` seconds after its first image came,
    or at once when the tower was busy meanwhile and images are waiting. At most `max_queued` images
    wait; one more is an `EncodeOverloadedError`. For use from one event loop.
    """

    def __init__(
        self,
        encode: EncodeBatch,
        *,
        max_images: int,
        max_wait_s: float,
        max_queued: int,
        metrics: EncodeMetrics | None = None,
    ) -> None:
        self._encode = encode
        self._metrics = metrics or EncodeMetrics()
        self._max_images = max_images
        self._max_wait_s = max_wait_s
        self._max_queued = max_queued
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vision-tower")
        self._batches = self._images = self._failures = 0
        self._runner = asyncio.create_task(self._run(), name="micro-batcher")

    async def submit(self, item: Any) -> BatchedItem:
        """Encode one preprocessed image.

        Raises the image's own error, or `EncodeOverloadedError` when too many wait. A caller that is
        cancelled while its image waits takes it out of the queue; once in the tower it runs on.
        """
        if len(self._waiting) >= self._max_queued:
            raise EncodeOverloadedError(
                f"{self._max_queued} images already wait for the vision tower; retry in a moment"
            )
        entry = _Waiting(item, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._waiting.append(entry)
        self._arrived.set()
        try:
            return await entry.result
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def statistics(self) -> BatcherStatistics:
        """Count what has been encoded."""
        return BatcherStatistics(len(self._waiting), self._batches, self._images, self._failures)

    async def close(self) -> None:
        """Stop; images that still wait get `EncodeFailedError`. The batch in the tower is waited for."""
        self._runner.cancel()
        await asyncio.wait({self._runner})
        for entry in self._waiting:
            entry.result.set_exception(EncodeFailedError("the encode worker is shutting down; retry"))
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = await self._collect()
            if batch:
                await self._run_batch(batch)

    async def _collect(self) -> list[_Waiting]:
        deadline = time.monotonic() + self._max_wait_s
        while len(self._waiting) < self._max_images:
            self._arrived.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._arrived.wait()
            except TimeoutError:
                break
        batch, self._waiting = self._waiting[: self._max_images], self._waiting[self._max_images :]
        if self._waiting:
            self._arrived.set()
        else:
            self._arrived.clear()
        return batch

    async def _run_batch(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        self._metrics.batch_images.observe(len(batch))
        for entry in batch:
            self._metrics.queue_wait.observe(started - entry.since)
        loop = asyncio.get_running_loop()
        run = loop.run_in_executor(self._thread, self._encode_all, [entry.item for entry in batch])
        try:
            results = await asyncio.shield(run)
        except asyncio.CancelledError:
            # close() came while the tower runs: the callers of this batch still get their results.
            self._deliver(batch, await run, time.perf_counter() - started)
            raise
        self._deliver(batch, results, time.perf_counter() - started)

    def _encode_all(self, items: list[Any]) -> list[EncodedItem | MmCacheError]:
        try:
            results = self._encode(items)
        except MmCacheError as error:
            return [error] * len(items)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything; every caller must hear of it
            failure = EncodeFailedError(f"the vision tower failed: {type(error).__name__}")
            failure.__cause__ = error
            return [failure] * len(items)
        if len(results) != len(items):
            return [
                EncodeFailedError(f"the vision tower gave {len(results)} results for {len(items)} images")
            ] * len(items)
        return results

    def _deliver(
        self, batch: list[_Waiting], results: list[EncodedItem | MmCacheError], seconds: float
    ) -> None:
        self._batches += 1
        for entry, result in zip(batch, results, strict=True):
            failed = isinstance(result, MmCacheError)
            self._failures += failed
            self._images += not failed
            if not failed:
                self._metrics.encode.observe(seconds / len(batch))
            if entry.result.done():
                continue
            if isinstance(result, MmCacheError):
                entry.result.set_exception(result)
            else:
                entry.result.set_result(BatchedItem(result, seconds / len(batch)))
