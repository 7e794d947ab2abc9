"""Rank 0's side of a tensor-parallel worker: it hands out the work and waits until all are done with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import StoppingCriteria, StoppingCriteriaList

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.base import LeasedEmbedding
from trtllm_mm_cache.engines.huggingface.model_files import first_line
from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.transformers.lockstep import (
    AnnouncedEnd,
    Limits,
    RankReport,
    Work,
)
from trtllm_mm_cache.engines.transformers.peers import Peers
from trtllm_mm_cache.engines.transformers.rendezvous import COLLECTIVE_DEADLINE_S, Meeting, meet_followers
from trtllm_mm_cache.errors import ConfigurationError

_LOADING_DEADLINE_S = 3600.0
_CLOSING_DEADLINE_S = 5.0


class Ranks(Protocol):
    """The other ranks, as rank 0's generator sees them. For its computing thread, except `share`."""

    @property
    def size(self) -> int:
        """How many ranks compute, rank 0 included."""
        ...

    def share(self, leases: Sequence[LeasedEmbedding]) -> tuple[Handle, ...]:
        """Return how the other ranks open the embeddings of a request. Copies nothing."""
        ...

    def computing(
        self, inputs: Mapping[str, Any], embeddings: Sequence[Handle], limits: Limits
    ) -> contextlib.AbstractContextManager[None]:
        """While the block runs `generate`, the other ranks do too; all are done when it ends."""
        ...

    def criteria(self, *own: StoppingCriteria) -> StoppingCriteriaList:
        """Return what ends the answer: `own` decide, and the other ranks follow."""
        ...

    def wait_loaded(self) -> None:
        """Wait until every rank has the model. Raises `ConfigurationError` when one cannot load it."""
        ...

    def dismiss(self) -> None:
        """Tell the other ranks that it is over, and do not wait for them. Idempotent."""
        ...

    def close(self) -> None:
        """Dismiss the other ranks and wait until they have ended. Idempotent."""
        ...


class Alone:
    """`Ranks` of a worker that has one: everything is a no-op."""

    size = 1

    def share(self, leases: Sequence[LeasedEmbedding]) -> tuple[Handle, ...]:
        """Return nothing: there is no other rank."""
        del leases
        return ()

    @contextlib.contextmanager
    def computing(
        self, inputs: Mapping[str, Any], embeddings: Sequence[Handle], limits: Limits
    ) -> Iterator[None]:
        """Run the block."""
        del inputs, embeddings, limits
        yield

    def criteria(self, *own: StoppingCriteria) -> StoppingCriteriaList:
        """Return `own`."""
        return StoppingCriteriaList(own)

    def wait_loaded(self) -> None:
        """Return."""

    def dismiss(self) -> None:
        """Return."""

    def close(self) -> None:
        """Return."""


class Leader:
    """`Ranks` of rank 0 under mpirun. When another rank is lost, the process ends: see `peers`."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._peers = Peers(0, meeting.connections)
        self.size = 1 + len(self._peers)

    def share(self, leases: Sequence[LeasedEmbedding]) -> tuple[Handle, ...]:
        """See `Ranks.share`."""
        return tuple(lease.handle() for lease in leases)

    @contextlib.contextmanager
    def computing(
        self, inputs: Mapping[str, Any], embeddings: Sequence[Handle], limits: Limits
    ) -> Iterator[None]:
        """See `Ranks.computing`. An error in the block ends the worker: the ranks are out of step."""
        self._peers.send(Work.of(inputs, embeddings, limits))
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it ends the process
            self._peers.fail(f"{type(error).__name__}: {first_line(error)}")
        self._gather(COLLECTIVE_DEADLINE_S)

    def criteria(self, *own: StoppingCriteria) -> StoppingCriteriaList:
        """See `Ranks.criteria`."""
        return StoppingCriteriaList([AnnouncedEnd(own, self._peers.send)])

    def wait_loaded(self) -> None:
        """See `Ranks.wait_loaded`."""
        for report in self._gather(_LOADING_DEADLINE_S):
            if report.error:
                raise ConfigurationError(report.error)
        self._meeting.remove_folder()

    def dismiss(self) -> None:
        """See `Ranks.dismiss`."""
        self._meeting.remove_folder()
        self._peers.announce_end()

    def close(self) -> None:
        """See `Ranks.close`. A rank that does not end within 5 s ends the process with status 1."""
        self.dismiss()
        if not self._peers.wait_gone(_CLOSING_DEADLINE_S):
            self._peers.lose(f"a rank did not end within {_CLOSING_DEADLINE_S:.0f} s")

    def _gather(self, deadline_s: float) -> list[RankReport]:
        """Wait for one report of each other rank."""
        return [self._peers.receive(deadline_s) for _ in range(len(self._peers))]


def ranks_of_job(model_path: Path) -> Ranks:
    """Meet the other ranks of this process's mpirun job; `Alone` where there are none. Blocking.

    They load the model of `model_path` at once. Raises `ConfigurationError`.
    """
    place = place_in_job()
    if place.size == 1:
        return Alone()
    return Leader(meet_followers(place, model_path))
