"""The scheduler's side of the connector by itself: which handle a load takes, and whose requests fail."""

from __future__ import annotations

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.vllm.handles import handle_of, load_entry
from trtllm_mm_cache.engines.vllm.scheduler_side import SchedulerSide
from trtllm_mm_cache.engines.vllm.step_copies import FailedLoads, StepCopies
from trtllm_mm_cache.engines.vllm.worker_side import WorkerSide


def handle(offset: int) -> Handle:
    return Handle(b"manager", b"/torch_1_2_3", 4096, offset, torch.float16, (2, 8))


def test_a_handle_survives_its_way() -> None:
    assert handle_of(load_entry(handle(64))) == handle(64)


def test_a_load_takes_the_requests_own_handle() -> None:
    """An entry may have been evicted and made anew: each request leases another extent of the same key."""
    side = SchedulerSide()
    side.note("first", {"key": load_entry(handle(0))}, {})
    side.note("second", {"key": load_entry(handle(64))}, {})
    side.schedule("second", "key")
    side.schedule("first", "key")
    assert side.take_step().loads == [("key", handle(64)), ("key", handle(0))]
    assert side.take_step().loads == []


def test_handles_go_with_their_requests() -> None:
    side = SchedulerSide()
    side.note("first", {"key": load_entry(handle(0))}, {})
    side.note("second", {"key": load_entry(handle(64)), "other": load_entry(handle(128))}, {})
    side.end("first")
    assert side.has("key")
    side.end("second")
    assert not side.has("key")
    assert not side.has("other")
    side.end("second")
    side.schedule("second", "key")
    assert side.take_step().loads == [], "nothing raises: it would end the engine"


def test_a_failed_load_fails_all_that_use_it_now_and_later() -> None:
    side = SchedulerSide()
    side.note("first", {"key": load_entry(handle(0))}, {})
    side.note("other", {"another": load_entry(handle(64))}, {})
    failed = FailedLoads(frozenset({"key"})).aggregate(FailedLoads(frozenset({"key"})))
    side.fail(failed.identifiers)
    assert side.take_unavailable() == {"first"}
    assert side.take_unavailable() == set()
    side.note("late", {"key": load_entry(handle(0))}, {})
    assert side.take_unavailable() == {"late"}


def test_a_worker_that_cannot_load_reports_it_and_does_not_raise() -> None:
    worker, cache = WorkerSide(torch.device("cpu")), {"there": torch.ones(1)}
    worker.load(StepCopies([("key", handle(0)), ("there", handle(0))]), cache)
    assert torch.equal(cache["key"], torch.zeros(2, 8, dtype=torch.float16))
    assert torch.equal(cache["there"], torch.ones(1)), "what vLLM has is not loaded again"
    assert worker.take_failed() == FailedLoads(frozenset({"key"}))
    assert worker.take_failed() is None
