"""Which LoRA adapters the PD workers of a deployment have, as its frontend learns it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from trtllm_mm_cache.errors import MmCacheError, PdUnavailableError
from trtllm_mm_cache.runtime.control import AdaptersReport, AdaptersRequest
from trtllm_mm_cache.runtime.control_client import ControlClient, Worker, WorkerUnreachableError

logger = logging.getLogger(__name__)

_ASK_S: Final = 2.0

_REMEMBERED_S: Final = 600.0
"""An adapter whose last worker has gone is one that will be back, and not an unknown name, for so long."""


class AdapterDirectory:
    """Asks each PD worker once, when it is first needed: a worker's adapters are those it was started with.

    For use from one event loop. Requests for the base model cost nothing here. `workers` returns the ids of
    the workers that are alive.
    """

    def __init__(self, control: ControlClient, workers: Callable[[], Sequence[int]]) -> None:
        self._control = control
        self._workers = workers
        self._adapters: dict[int, frozenset[str]] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._gone: dict[str, float] = {}

    def has(self, instance: int, name: str) -> bool:
        """Whether that worker has said that it has this adapter."""
        return name in self._adapters.get(instance, ())

    async def names(self) -> list[str]:
        """Return the names of all adapters that are known, in order."""
        await self._ask_new_ones()
        alive = set[str]().union(*self._adapters.values())
        return sorted(alive | self._gone.keys())

    async def knows(self, name: str) -> bool:
        """Whether some worker has this adapter, or had it until a few minutes ago.

        Raises `PdUnavailableError` while there is no worker, or one that may have it has not answered.
        """
        if any(self.has(instance, name) for instance in self._workers()):
            return True
        if name in await self.names():
            return True
        if not self._adapters or set(self._workers()) - self._adapters.keys():
            raise PdUnavailableError(
                "model: it is not the base model, and PD workers have not said yet which adapters they have; "
                "retry in a moment"
            )
        return False

    async def _ask_new_ones(self) -> None:
        alive = set(self._workers())
        new = alive - self._adapters.keys()
        for instance in new - self._asking.keys():
            self._asking[instance] = asyncio.create_task(self._ask(instance))
        if new:
            await asyncio.wait([self._asking[instance] for instance in new])
        now = asyncio.get_running_loop().time()
        for instance in self._adapters.keys() - alive:
            self._gone |= dict.fromkeys(self._adapters.pop(instance), now)
        self._gone = {name: since for name, since in self._gone.items() if now - since < _REMEMBERED_S}

    async def _ask(self, instance: int) -> None:
        try:
            request, worker = AdaptersRequest(), Worker("PD", instance)
            report = await self._control.call(worker, request, AdaptersReport, timeout_s=_ASK_S)
            self._adapters[instance] = frozenset(report.adapters)
        except WorkerUnreachableError as error:
            logger.debug("%s", error)  # it is asked again
        except MmCacheError as error:
            logger.warning("PD worker %x is taken for one without adapters: %s", instance, error)
            self._adapters[instance] = frozenset()
        finally:
            del self._asking[instance]
