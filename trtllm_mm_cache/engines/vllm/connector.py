"""vLLM's encoder cache (EC) connector of ours. It runs inside EngineCore and inside each worker of vLLM.

vLLM makes one instance in EngineCore (the scheduler's side, which decides) and one in each worker (which
copies), and passes what the first decides for a step to the others: `StepCopies`. What a worker could not do
comes back as `FailedLoads`. Both sides are classes of their own below; `ArenaConnector` only hands calls on.

An embedding that a request brings is loaded into vLLM's encoder cache. One that the vision tower makes here
is copied out into the extent that a request reserved for it (a fill), in the step in which it is made and at
most once: after that, or when the request has ended, nothing here can write to the extent any more.

An exception here ends EngineCore and every request with it, so nothing below may raise for a request's sake:
what a request names is checked in the PD worker before it is sent (`prepare.py`).

Interfaces as read and run in vLLM 0.32 (`distributed/ec_transfer/ec_connector/base.py`).
"""

from __future__ import annotations

import ctypes
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from vllm.distributed.ec_transfer import get_ec_transfer
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)

from trtllm_mm_cache.cache.arena.handle import Handle, OpenArenas
from trtllm_mm_cache.cache.arena.marks import write_mark
from trtllm_mm_cache.engines.own_tower import Fill
from trtllm_mm_cache.engines.vllm.copies import copies_for
from trtllm_mm_cache.engines.vllm.cpu_generators import make_generators_rewind
from trtllm_mm_cache.engines.vllm.handles import LOAD, fill_of, handle_from, handle_of
from trtllm_mm_cache.engines.vllm.parent import end_with_parent

logger = logging.getLogger(__name__)


ENCODES = "encodes"
"""Key of the connector's configuration: where the workers count what the tower encodes, as a plain handle."""


@dataclass
class StepCopies(ECConnectorMetadata):  # type: ignore[misc]
    """What the workers load before a step and copy out within it, by identifier."""

    loads: list[tuple[str, Handle]] = field(default_factory=list)
    fills: dict[str, Fill] = field(default_factory=dict)


@dataclass(frozen=True)
class FailedLoads(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """Identifiers of embeddings that a worker could not load."""

    identifiers: frozenset[str]

    def aggregate(self, other: FailedLoads) -> FailedLoads:
        """Return the failures of both: one rank's is everybody's."""
        return FailedLoads(self.identifiers | other.identifiers)


class SchedulerSide:
    """Decides in EngineCore what is copied. Every handle is one of a request that has not ended."""

    def __init__(self) -> None:
        self._handles: defaultdict[str, dict[str, Handle]] = defaultdict(dict)
        self._fills: dict[tuple[str, str], Fill] = {}
        self._requests: dict[str, tuple[str, ...]] = {}
        self._step = StepCopies()
        self._failed: set[str] = set()
        self._unavailable: set[str] = set()

    def note(self, request_id: str, params: dict[str, Any]) -> None:
        """Take the handles that came with a request; again for a request that is known costs nothing."""
        if request_id in self._requests:
            return
        self._requests[request_id] = tuple(params)
        for identifier, entry in params.items():
            if entry[0] == LOAD:
                self._handles[identifier][request_id] = handle_of(entry)
            else:
                self._fills[request_id, identifier] = fill_of(entry)
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
        fill = self._fills.pop((request_id, identifier), None)
        if fill is not None:
            self._step.fills[identifier] = fill
        handles = self._handles.get(identifier)
        if handles:
            handle = handles.get(request_id) or next(iter(handles.values()))
            self._step.loads.append((identifier, handle))

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
        for identifier in self._requests.pop(request_id, ()):
            self._fills.pop((request_id, identifier), None)
            handles = self._handles.get(identifier)
            if handles is not None:
                handles.pop(request_id, None)
                if not handles:
                    del self._handles[identifier]


class WorkerSide:
    """Copies in a worker what the scheduler's side decided. Each arena is mapped once."""

    def __init__(self, device: torch.device, *, encodes: Handle | None = None) -> None:
        """`encodes` is where this worker counts what is encoded; None where it does not, nor fills."""
        self._copies = copies_for(device)
        self._arenas = OpenArenas()
        self._encodes = None if encodes is None else self._arenas.tensor(encodes)
        self._failed: set[str] = set()

    def load(self, step: StepCopies, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Copy embeddings into vLLM's encoder cache. Never raises: zeros stand for what cannot be copied."""
        for identifier, handle in step.loads:
            if identifier in encoder_cache:
                continue
            try:
                encoder_cache[identifier] = self._copies.copy(self._arenas.tensor(handle))
            except Exception:
                logger.exception("an embedding could not be loaded from the arena; its requests fail")
                self._failed.add(identifier)
                encoder_cache[identifier] = self._copies.zeros(handle.shape, handle.dtype)

    def save(self, step: StepCopies, identifier: str, made: torch.Tensor) -> None:
        """Copy out what the tower has made, if this step has a fill for it. Never raises.

        Of several ranks, which all have the whole of it, one does so.
        """
        if self._encodes is None:
            return
        self._encodes += 1
        fill = step.fills.pop(identifier, None)
        if fill is None:
            return
        try:
            target = self._arenas.tensor(fill.target)
            if target.shape != made.shape or target.dtype != made.dtype:
                logger.error("an embedding of another shape was made than its extent was reserved for")
                return
            self._copies.store(made, target)
            write_mark(self._arenas.tensor(fill.mark), fill.nonce, _checksum(target))
        except Exception:
            logger.exception("an embedding could not be copied into the arena; it is not kept")

    def wait(self) -> None:
        """Block until nothing reads the arena any more."""
        self._copies.wait()

    def take_failed(self) -> FailedLoads | None:
        """Return what could not be loaded since the last call."""
        failed, self._failed = self._failed, set()
        return FailedLoads(frozenset(failed)) if failed else None


class ArenaConnector(ECConnectorBase):  # type: ignore[misc]
    """What vLLM calls; each method belongs to the one side or the other."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        end_with_parent()
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        if role == ECConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide()
        else:
            device = torch.device(vllm_config.device_config.device_type)
            if device.type == "cpu":
                make_generators_rewind()
            encodes = vllm_config.ec_transfer_config.get_from_extra_config(ENCODES, None)
            if encodes is not None and vllm_config.parallel_config.rank > 0:
                encodes = None
            self.worker = WorkerSide(device, encodes=None if encodes is None else handle_from(encodes))

    # The scheduler's side.

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Note the request's handles: it is asked for each request before `has_cache_item`."""
        del num_computed_tokens
        if self.scheduler is not None and request.ec_transfer_params:
            self.scheduler.note(request.request_id, request.ec_transfer_params)
        return True

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the workers load it, so that the vision tower need not run."""
        return self.scheduler is not None and self.scheduler.has(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """vLLM has made room for the request's item at `index`: it is loaded or encoded in this step."""
        if self.scheduler is not None:
            self.scheduler.schedule(request.request_id, request.mm_features[index].identifier)

    def build_connector_meta(self, scheduler_output: Any) -> StepCopies:
        """Return what the workers are to do before and in this step."""
        del scheduler_output
        return self.scheduler.take_step() if self.scheduler is not None else StepCopies()

    def update_connector_output(self, connector_output: Any) -> None:
        """Take what the workers could not do."""
        failed = connector_output.ec_connector_worker_meta
        if self.scheduler is not None and failed is not None:
            self.scheduler.fail(failed.identifiers)

    def take_unavailable_requests(self) -> set[str]:
        """Return the requests that vLLM is to end with an error."""
        return self.scheduler.take_unavailable() if self.scheduler is not None else set()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request's handles."""
        if self.scheduler is not None:
            self.scheduler.end(request.request_id)
        return False, None

    # The worker's side.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Load what the scheduler's side decided for this step."""
        del kwargs
        if self.worker is not None:
            self.worker.load(self._get_connector_metadata(), encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Copy out what vLLM's own tower has encoded, where a request asked for it."""
        del kwargs
        if self.worker is not None:
            self.worker.save(self._get_connector_metadata(), mm_hash, encoder_cache[mm_hash])

    def build_connector_worker_meta(self) -> FailedLoads | None:
        """Return what failed in this step."""
        return self.worker.take_failed() if self.worker is not None else None


class WorkerExtension:
    """Adds a method to vLLM's workers, by which the PD worker waits for loads of requests that it aborted."""

    def wait_for_embedding_loads(self) -> None:
        """Return when no step that was sent to this worker before reads the arena any more."""
        connector = get_ec_transfer()
        if isinstance(connector, ArenaConnector) and connector.worker is not None:
            connector.worker.wait()


def _checksum(tensor: torch.Tensor) -> int:
    """Return XXH3-64 over the bytes of a contiguous tensor."""
    memory = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return xxhash.xxh3_64_intdigest(memory)
