"""A request's items together: their leases in prompt order; or, when one fails, what is raised."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.pd.metrics import LookupOutcome
from trtllm_mm_cache.tiers.filling import HeldFilling


@dataclass(frozen=True)
class Found:
    """One item's lease and how it was come by; or what the engine is to fill, in the place of a lease."""

    lease: Lease | HeldFilling
    outcome: LookupOutcome


@dataclass(frozen=True)
class ResolvedItems:
    """Leases in prompt order, to be released by the caller, and what they cost.

    `joined` of the `misses` waited for a flight that was under way. Each distinct reference counts once; of
    the prompt's rows, all that hits stand for are `hit_rows`.
    """

    leases: tuple[Lease | HeldFilling, ...]
    hits: int
    misses: int
    joined: int
    hit_rows: int
    nbytes: int
    seconds: float

    @property
    def rows(self) -> int:
        """Rows of all leases together: as many tokens of the prompt."""
        return sum(lease.shape[0] for lease in self.leases)

    @classmethod
    def of(cls, places: Sequence[int], found: Mapping[int, Found], *, seconds: float) -> ResolvedItems:
        """Put what was `found` in prompt order; it took `seconds`.

        `places` has for each position the one at which its reference stands first, which `found` is by. One
        lease a position: a reference that stands twice gets a second lease on the same view.
        """
        leases: list[Lease | HeldFilling] = []
        for position, first in enumerate(places):
            lease = found[first].lease
            leases.append(lease if position == first else lease.clone())
        outcomes = [each.outcome for each in found.values()]
        return cls(
            leases=tuple(leases),
            hits=outcomes.count("hit"),
            misses=len(outcomes) - outcomes.count("hit"),
            joined=outcomes.count("joined"),
            hit_rows=sum(found[first].lease.shape[0] for first in places if found[first].outcome == "hit"),
            nbytes=sum(lease.nbytes for lease in leases),
            seconds=seconds,
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the items, in prompt order."""
        return tuple(lease.key for lease in self.leases)

    def first_token(self) -> None:
        """The engine has made the first token, for which it needed every embedding. Again costs nothing."""
        for lease in self.leases:
            if isinstance(lease, HeldFilling):
                lease.first_token()

    def release(self) -> None:
        """Release every lease. Idempotent."""
        for lease in self.leases:
            lease.release()


async def all_or_first_error(works: Sequence[Coroutine[Any, Any, Found]]) -> list[Found]:
    """Run `works` at the same time and return their results in order.

    When one fails, the others are cancelled; when all have ended, the leases of those that had one are
    released and the first one's error is raised, ours before foreign ones. No task group: the group that it
    raises and the tasks would keep each other, and the requests' bytes, until the garbage collector runs.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    error: BaseException | None = None
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if all(_succeeded(task) for task in tasks):
            return [task.result() for task in tasks]
        await _cancel_all(tasks)
        error = _first_error([task.exception() for task in tasks if not task.cancelled()])
        _release(tasks)
        raise error or asyncio.CancelledError
    except asyncio.CancelledError:
        await _cancel_all(tasks)
        _release(tasks)
        raise
    finally:
        # The error's traceback leads to this frame, which must not lead back to the error.
        del tasks, error


async def _cancel_all(tasks: Sequence[asyncio.Future[Found]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _succeeded(task: asyncio.Future[Found]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _release(tasks: Sequence[asyncio.Future[Found]]) -> None:
    for task in tasks:
        if _succeeded(task):
            task.result().lease.release()


def _first_error(errors: Sequence[BaseException | None]) -> BaseException | None:
    raised = [error for error in errors if error is not None]
    ours = [error for error in raised if isinstance(error, MmCacheError)]
    if ours:
        return min(ours, key=lambda error: error.item_index or 0)
    return raised[0] if raised else None
