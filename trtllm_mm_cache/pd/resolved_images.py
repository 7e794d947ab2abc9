"""A request's images together: their leases in prompt order; or, when one fails, what is raised."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.pd.metrics import LookupOutcome


@dataclass(frozen=True)
class Found:
    """One image's lease and how it was come by."""

    lease: Lease
    outcome: LookupOutcome


@dataclass(frozen=True)
class ResolvedItems:
    """Leases in prompt order, to be released by the caller, and what they cost.

    `joined` of the `misses` waited for a flight that was under way. Each distinct reference counts once.
    """

    leases: tuple[Lease, ...]
    hits: int
    misses: int
    joined: int
    nbytes: int
    seconds: float

    @classmethod
    def of(cls, references: Sequence[str], found: Mapping[str, Found], *, seconds: float) -> ResolvedItems:
        """Put what was `found` for each distinct reference in prompt order; it took `seconds`.

        One lease a position: a reference that stands twice gets a second lease on the same view.
        """
        given: set[str] = set()
        leases = []
        for reference in references:
            lease = found[reference].lease
            leases.append(lease.clone() if reference in given else lease)
            given.add(reference)
        outcomes = [each.outcome for each in found.values()]
        return cls(
            leases=tuple(leases),
            hits=outcomes.count("hit"),
            misses=len(outcomes) - outcomes.count("hit"),
            joined=outcomes.count("joined"),
            nbytes=sum(lease.nbytes for lease in leases),
            seconds=seconds,
        )

    def release(self) -> None:
        """Give every lease back. Idempotent."""
        for lease in self.leases:
            lease.release()


def release_finished(tasks: Iterable[asyncio.Task[Found]]) -> None:
    """Give back the leases of the tasks that have one, when the request gets nothing."""
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception() is None:
            task.result().lease.release()


def first_error(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what to raise for a request: our errors before foreign ones, the first image's before others."""
    known = [error for error in failures.exceptions if isinstance(error, MmCacheError)]
    if known:
        return min(known, key=lambda error: error.item_index or 0)
    return failures.exceptions[0]
