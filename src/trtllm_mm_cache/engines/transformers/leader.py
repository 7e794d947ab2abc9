"""Rank 0's side of a tensor-parallel worker: it hands out the work and notices when a rank is gone.

The ranks of a worker live and die together. When one is lost (killed, out of memory, frozen past the
deadline), or fails where the others do not, nothing can be computed any more: rank 0 says so in one line
and ends its process with status 1; the others see their connection close, and mpirun stops what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from transformers import StoppingCriteria, StoppingCriteriaList

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.transformers.loading import first_line
from trtllm_mm_cache.engines.transformers.lockstep import (
    AnnouncedEnd,
    Limits,
    Report,
    SharedView,
    Step,
    Work,
)
from trtllm_mm_cache.engines.transformers.rendezvous import COLLECTIVE_DEADLINE_S, Meeting, meet_followers
from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

EXIT_LOST = 1
"""Status of a process that ends because another rank has."""

NOTICE_S = 1.0
"""How long a rank whose computation broke off waits to see that another rank is gone: then that is why."""

_PARENT_PERIOD_S = 1.0
_LOADING_DEADLINE_S = 3600.0
_CLOSING_DEADLINE_S = 5.0


class Ranks(Protocol):
    """The other ranks, as rank 0's generator sees them. For its computing thread, except `share`."""

    @property
    def size(self) -> int:
        """How many ranks compute, rank 0 included."""
        ...

    def share(self, leases: Sequence[Lease]) -> tuple[SharedView, ...]:
        """Describe the embeddings of a request for the other ranks. Copies nothing."""
        ...

    def computing(
        self, inputs: Mapping[str, Any], images: Sequence[SharedView], limits: Limits
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

    def share(self, leases: Sequence[Lease]) -> tuple[SharedView, ...]:
        """Return nothing: nobody asks."""
        del leases
        return ()

    @contextlib.contextmanager
    def computing(
        self, inputs: Mapping[str, Any], images: Sequence[SharedView], limits: Limits
    ) -> Iterator[None]:
        """Run the block."""
        del inputs, images, limits
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
    """`Ranks` of rank 0 under mpirun."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._connections = dict(meeting.connections)
        self.size = 1 + len(self._connections)
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._losing = threading.Lock()
        self._mpirun = os.getppid()
        self._watch = threading.Thread(target=self._watch_ranks, name="watch-ranks", daemon=True)
        self._watch.start()

    def share(self, leases: Sequence[Lease]) -> tuple[SharedView, ...]:
        """See `Ranks.share`."""
        return tuple(SharedView.of(lease) for lease in leases)

    @contextlib.contextmanager
    def computing(
        self, inputs: Mapping[str, Any], images: Sequence[SharedView], limits: Limits
    ) -> Iterator[None]:
        """See `Ranks.computing`. An error in the block ends the worker: the ranks are out of step."""
        self._send(Work.of(inputs, images, limits))
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it ends the process
            self._watch.join(NOTICE_S)
            self._lose(f"rank 0 failed: {type(error).__name__}: {first_line(error)}")
        self._gather(COLLECTIVE_DEADLINE_S)

    def criteria(self, *own: StoppingCriteria) -> StoppingCriteriaList:
        """See `Ranks.criteria`."""
        return StoppingCriteriaList([AnnouncedEnd(own, self._send)])

    def wait_loaded(self) -> None:
        """See `Ranks.wait_loaded`."""
        for report in self._gather(_LOADING_DEADLINE_S):
            if report.error:
                raise ConfigurationError(report.error)
        self._meeting.remove_folder()

    def dismiss(self) -> None:
        """See `Ranks.dismiss`."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._meeting.remove_folder()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # it has ended already
                connection.send(None)

    def close(self) -> None:
        """See `Ranks.close`. A rank that does not end within 5 s ends the process with status 1."""
        self.dismiss()
        self._watch.join(_CLOSING_DEADLINE_S)
        if self._watch.is_alive():
            self._lose(f"a rank did not end within {_CLOSING_DEADLINE_S:.0f} s")

    def _send(self, message: Work | Step) -> None:
        for rank, connection in self._connections.items():
            try:
                connection.send(message)
            except OSError:
                self._lose(_gone(rank, self.size))

    def _gather(self, deadline_s: float) -> list[Report]:
        """Wait for one report of each other rank; ends the worker when one does not come in time."""
        deadline = time.monotonic() + deadline_s
        reports: list[Report] = []
        while len(reports) < len(self._connections):
            try:
                reports.append(self._reports.get(timeout=max(deadline - time.monotonic(), 0)))
            except queue.Empty:
                self._lose(f"no word from another rank for {deadline_s:.0f} s")
        return reports

    def _watch_ranks(self) -> None:
        """Run in a thread of its own until every connection is closed."""
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while ranks:
            if os.getppid() != self._mpirun:
                self._lose("mpirun is gone")
            for ready in wait(list(ranks), timeout=_PARENT_PERIOD_S):
                connection = cast(Connection, ready)
                try:
                    self._reports.put(connection.recv())
                except (EOFError, OSError):
                    rank = ranks.pop(connection)
                    if not self._closing.is_set():
                        self._lose(_gone(rank, self.size))

    def _lose(self, what: str) -> NoReturn:
        """Say what happened, once, and end the process: nothing can be computed any more."""
        with self._losing:  # never released: a second finder waits here while the first ends the process
            logger.critical("%s; all ranks of the PD worker end", what)
            os._exit(EXIT_LOST)


def _gone(rank: int, size: int) -> str:
    return f"rank {rank} of {size} is gone (its output, or the system's log, says why)"


def ranks_of_job(model_path: Path) -> Ranks:
    """Meet the other ranks of this process's mpirun job; `Alone` where there are none. Blocking.

    They load the model of `model_path` at once. Raises `ConfigurationError`.
    """
    place = place_in_job()
    if place.size == 1:
        return Alone()
    return Leader(meet_followers(place, model_path))
