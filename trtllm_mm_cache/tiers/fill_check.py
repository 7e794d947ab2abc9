"""The last step of a fill: what the engine's own tower has written becomes an entry, if it is right.

The engine's process says the bytes' checksum; this one takes its own over the extent, looks for NaN and
infinity in the same pass, and commits. What is wrong is counted, logged and not kept: the answer that it was
made for has it, and the next request encodes anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import ChecksumMismatchError, EmbeddingMismatchError, MmCacheError
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.filling import Filling
from trtllm_mm_cache.tiers.intake import Intake
from trtllm_mm_cache.transfer.finite import checksum_and_finite

logger = logging.getLogger(__name__)


class FillChecks:
    """Checks of filled extents, each a task, read by threads of `executor`. For use from one event loop.

    `used` is called with an item and a lease on its new entry, which it does not release. `refused` counts
    embeddings that were found wrong.
    """

    def __init__(
        self, intake: Intake, executor: Executor, used: Callable[[MissingItem, Lease], None]
    ) -> None:
        self._intake = intake
        self._executor = executor
        self._used = used
        self._tasks: set[asyncio.Task[None]] = set()
        self.refused = 0

    def start(self, filling: Filling) -> None:
        """Make an entry of what the engine has filled, some time soon, if it is what the engine says."""
        task = asyncio.create_task(self._check(filling), name="check of a filled extent")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel what still runs; nothing of it is kept."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _check(self, filling: Filling) -> None:
        try:
            with self._intake.commit_step.time():
                lease = await self._commit(filling)
        except MmCacheError as error:
            self.refused += 1
            logger.error("embedding %s… is not kept: %s", filling.item.key.hex[:12], error)  # noqa: TRY400
            filling.refused()
        except BaseException:
            filling.refused()
            raise
        else:
            filling.committed(lease)
            self._used(filling.item, lease)
            lease.release()

    async def _commit(self, filling: Filling) -> Lease:
        item, extent, shape = filling.item, filling.extent, filling.prepared.shape
        assert extent is not None  # noqa: S101 - else nothing is filled
        address, dtype = extent.reservation.address, str(shape.dtype).removeprefix("torch.")
        look = partial(checksum_and_finite, address, shape.nbytes, dtype)
        checksum, finite = await asyncio.get_running_loop().run_in_executor(self._executor, look)
        if checksum != extent.mark.checksum():
            raise ChecksumMismatchError("its bytes are not those that the engine's tower has made")
        if not finite:
            raise EmbeddingMismatchError("it holds NaN or infinity")
        metadata = replace(filling.prepared.metadata, checksum=checksum)
        return self._intake.commit(item, extent.reservation, shape.dtype, (shape.rows, shape.width), metadata)
