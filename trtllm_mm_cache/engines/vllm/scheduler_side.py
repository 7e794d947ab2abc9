"""The connector in EngineCore: which embedding is copied in which step, and from whose extent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.own_tower import Fill
from trtllm_mm_cache.engines.vllm.handles import LOAD, fill_of, handle_of
from trtllm_mm_cache.engines.vllm.step_copies import StepCopies


class SchedulerSide:
    """Decides in EngineCore what is copied. Every handle is one of a request that has not ended."""

    def __init__(self) -> None:
        self._handles: defaultdict[str, dict[str, Handle]] = defaultdict(dict)
        self._fills: defaultdict[str, dict[str, tuple[int, Fill]]] = defaultdict(dict)
        self._requests: dict[str, tuple[str, ...]] = {}
        self._step = StepCopies()
        self._failed: set[str] = set()
        self._unavailable: set[str] = set()

    def note(self, request_id: str, params: dict[str, Any], begins: Mapping[str, int]) -> None:
        """Take the handles that came with a request; again for a request that is known costs nothing.

        `begins` says at which token of the prompt each item begins.
        """
        if request_id in self._requests:
            return
        self._requests[request_id] = tuple(params)
        for identifier, entry in params.items():
            if entry[0] == LOAD:
                self._handles[identifier][request_id] = handle_of(entry)
            else:
                self._fills[request_id][identifier] = begins.get(identifier, 0), fill_of(entry)
            if identifier in self._failed:
                self._unavailable.add(request_id)

    def has(self, identifier: str) -> bool:
        """Whether a live request brought the handle of an embedding."""
        return identifier in self._handles

    def schedule(self, request_id: str, identifier: str) -> None:
        """Have the workers load an embedding before the next step, or copy it out once it is made.

        From the request's own handle: its extent is leased until this request has ended, others' need not be.
        A fill is used up: a request that is preempted has its image encoded again, and the extent may by then
        be an entry that others read, or be reserved anew.
        """
        fill = self._take_fill(request_id, identifier)
        if fill is not None:
            self._step.fills[identifier] = fill
        handles = self._handles.get(identifier)
        if handles:
            handle = handles.get(request_id) or next(iter(handles.values()))
            self._step.loads.append((identifier, handle))

    @property
    def filling(self) -> tuple[str, ...]:
        """The requests with fills that are yet to be used."""
        return tuple(self._fills)

    def compute(self, request_id: str, until: int) -> None:
        """The next step computes the request's tokens before `until`.

        An item that this reaches, and that was not scheduled to be made, is in vLLM's encoder cache, or its
        tokens are in the prefix cache.
        """
        for identifier, (begin, _) in tuple(self._fills.get(request_id, {}).items()):
            if begin < until and (fill := self._take_fill(request_id, identifier)) is not None:
                self._step.kept[identifier] = fill

    def _take_fill(self, request_id: str, identifier: str) -> Fill | None:
        fills = self._fills.get(request_id, {})
        if identifier not in fills:
            return None
        _, fill = fills.pop(identifier)
        if not fills:
            del self._fills[request_id]
        return fill

    def take_step(self) -> StepCopies:
        """Return what is to be copied before and in the next step."""
        step, self._step = self._step, StepCopies()
        return step

    def fail(self, identifiers: Iterable[str]) -> None:
        """Fail the requests that use embeddings which a worker could not load.

        vLLM keeps the zeros that stand for such an embedding under its identifier; the PD worker gives later
        requests another identifier, and those that are under way with this one fail.
        """
        self._failed.update(identifiers)
        for request_id, wanted in self._requests.items():
            if not self._failed.isdisjoint(wanted):
                self._unavailable.add(request_id)

    def take_unavailable(self) -> set[str]:
        """Return the requests to fail."""
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    def end(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._fills.pop(request_id, None)
        for identifier in self._requests.pop(request_id, ()):
            handles = self._handles.get(identifier)
            if handles is not None:
                handles.pop(request_id, None)
                if not handles:
                    del self._handles[identifier]
