"""vLLM's encoder cache (EC) connector of ours. It runs inside EngineCore and inside each worker of vLLM.

vLLM makes one instance in EngineCore (the scheduler's side, which decides) and one in each worker (which
copies), and passes what the first decides for a step to the others: `StepCopies`. What a worker could not do
comes back as `FailedLoads`. `SchedulerSide` and `WorkerSide` do it; `ArenaConnector` only hands calls on.

An embedding that a request brings is loaded into vLLM's encoder cache. One that the vision tower makes here
is copied out into the extent that a request reserved for it (a fill), in the step in which it is made; one
that vLLM's encoder cache still has from an earlier request, in the step that reads it. At most once: after
that, or when the request has ended, nothing here can write to the extent any more.

An exception here ends EngineCore and every request with it, so nothing below may raise for a request's sake:
what a request names is checked in the PD worker before it is sent (`prepare.py`).

Interfaces as read and run in vLLM 0.32 (`distributed/ec_transfer/ec_connector/base.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.ec_transfer import get_ec_transfer
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole

from trtllm_mm_cache.engines.vllm.cpu_generators import make_generators_rewind
from trtllm_mm_cache.engines.vllm.handles import handle_from
from trtllm_mm_cache.engines.vllm.parent import end_with_parent
from trtllm_mm_cache.engines.vllm.scheduler_side import SchedulerSide
from trtllm_mm_cache.engines.vllm.step_copies import FailedLoads, StepCopies
from trtllm_mm_cache.engines.vllm.worker_side import WorkerSide

ENCODES = "encodes"
"""Key of the connector's configuration: where the workers count what the tower encodes, as a plain handle."""


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
            # Of an image that comes twice the first place counts.
            items = reversed(request.mm_features)
            begins = {item.identifier: item.mm_position.offset for item in items}
            self.scheduler.note(request.request_id, request.ec_transfer_params, begins)
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
        if self.scheduler is None:
            return StepCopies()
        tokens = scheduler_output.num_scheduled_tokens
        for request_id in self.scheduler.filling:
            if request_id in tokens:
                until = _computed(scheduler_output, request_id) + tokens[request_id]
                self.scheduler.compute(request_id, until)
        return self.scheduler.take_step()

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
        """Load what the scheduler's side decided for this step, and copy out what is there already."""
        del kwargs
        if self.worker is not None:
            step = self._get_connector_metadata()
            self.worker.load(step, encoder_cache)
            self.worker.keep(step, encoder_cache)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Copy out what vLLM's own tower has encoded, where a request asked for it."""
        del kwargs
        if self.worker is not None:
            self.worker.save(self._get_connector_metadata(), mm_hash, encoder_cache[mm_hash])

    def build_connector_worker_meta(self) -> FailedLoads | None:
        """Return what failed in this step."""
        return self.worker.take_failed() if self.worker is not None else None


class WorkerExtension:
    """Adds to vLLM's workers what the PD worker asks of them."""

    model_runner: Any

    def wait_for_embedding_loads(self) -> None:
        """Return when no step that was sent to this worker before reads the arena any more."""
        connector = get_ec_transfer()
        if isinstance(connector, ArenaConnector) and connector.worker is not None:
            connector.worker.wait()

    def modules_without_place(self, adapter_id: int) -> list[str]:
        """Return the modules of a loaded adapter that this worker's part of the model does not have."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(manager.get_adapter(adapter_id).loras.keys() - manager.modules.keys())


def _computed(scheduler_output: Any, request_id: str) -> int:
    """Return how many of a scheduled request's tokens were computed before this step."""
    for new in scheduler_output.scheduled_new_reqs:
        if new.req_id == request_id:
            return int(new.num_computed_tokens)
    running = scheduler_output.scheduled_cached_reqs
    return int(running.num_computed_tokens[running.req_ids.index(request_id)])
