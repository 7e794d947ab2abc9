"""Which adapters there are, as a frontend learns it of PD workers that come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dynamo.runtime import Context

from trtllm_mm_cache.errors import NotAMemberError, PdUnavailableError, ProtocolMismatchError
from trtllm_mm_cache.runtime.adapters import AdapterDirectory
from trtllm_mm_cache.runtime.control import AdaptersReport, AdaptersRequest, Control, DropReport, DropRequest
from trtllm_mm_cache.runtime.control_client import Worker, WorkerUnreachableError
from trtllm_mm_cache.runtime.messages import parse


class PeerControl:
    """Workers' control endpoints, on the interface of `ControlClient`, with the product's own `Control`."""

    def __init__(self, **adapters: list[str]) -> None:
        self.adapters: dict[int, list[str] | Exception] = {
            int(name.removeprefix("w")): names for name, names in adapters.items()
        }
        self.asked: list[int] = []
        self.gate: asyncio.Event | None = None

    async def call(self, worker: Worker, request: Any, report: Any, *, timeout_s: float) -> Any:
        self.asked.append(worker.instance)
        if self.gate is not None:
            await self.gate.wait()
        names = self.adapters[worker.instance]
        if isinstance(names, Exception):
            raise names
        (answer,) = [each async for each in Control(_no_drop, names).handle(request.model_dump(), Context())]
        return parse(report, answer)


async def _no_drop(request: DropRequest) -> DropReport:
    raise AssertionError("nothing was to be dropped")


async def test_each_worker_is_asked_once_and_what_comes_later_is_found() -> None:
    control, alive = PeerControl(w1=["cats", "dogs"], w2=["cats"], w3=["birds"]), [1, 2]
    directory = AdapterDirectory(control, lambda: alive)
    assert await directory.names() == ["cats", "dogs"]
    assert await directory.knows("dogs")
    assert not await directory.knows("birds")
    assert [directory.has(each, "cats") for each in (1, 2, 3)] == [True, True, False]
    assert sorted(control.asked) == [1, 2]
    alive.append(3)
    assert await directory.knows("birds")
    assert sorted(control.asked) == [1, 2, 3]


async def test_without_a_worker_a_name_is_not_unknown() -> None:
    """A deployment that is starting must not tell its clients to give up."""
    alive: list[int] = []
    directory = AdapterDirectory(PeerControl(w1=["cats"]), lambda: alive)
    with pytest.raises(PdUnavailableError):
        await directory.knows("cats")
    alive.append(1)
    assert await directory.knows("cats")
    assert not await directory.knows("dogs")


async def test_an_adapter_whose_only_worker_has_gone_is_known_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request for it is then retried, as for a base model whose workers are all starting again."""
    control, alive = PeerControl(w1=["cats"], w2=[]), [1, 2]
    directory = AdapterDirectory(control, lambda: alive)
    assert await directory.knows("cats")
    alive.remove(1)
    assert await directory.knows("cats")
    assert not directory.has(1, "cats")
    monkeypatch.setattr("trtllm_mm_cache.runtime.adapters._REMEMBERED_S", 0.0)
    assert not await directory.knows("cats")
    assert await directory.names() == []


async def test_while_a_worker_has_not_answered_a_name_is_not_unknown() -> None:
    control = PeerControl(w1=["cats"])
    control.adapters[2] = WorkerUnreachableError("stands still")
    directory = AdapterDirectory(control, lambda: [1, 2])
    assert await directory.knows("cats")
    with pytest.raises(PdUnavailableError):
        await directory.knows("dogs")
    assert await directory.names() == ["cats"]
    control.adapters[2] = ["dogs"]
    assert await directory.knows("dogs")


@pytest.mark.parametrize("error", [NotAMemberError("no"), ProtocolMismatchError("another release")])
async def test_who_is_no_member_or_of_an_older_release_has_none(error: Exception) -> None:
    control = PeerControl(w1=["cats"])
    control.adapters[2] = error
    directory = AdapterDirectory(control, lambda: [1, 2])
    assert not await directory.knows("dogs")
    assert not await directory.knows("birds")
    assert control.asked.count(2) == 1


async def test_many_that_ask_wait_for_one_answer_and_who_leaves_takes_it_from_no_other() -> None:
    control = PeerControl(w1=["cats"])
    control.gate = asyncio.Event()
    directory = AdapterDirectory(control, lambda: [1])
    asking = [asyncio.create_task(directory.knows("cats")) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    control.gate.set()
    assert await asyncio.gather(*asking[1:]) == [True] * 19
    assert control.asked == [1]


async def test_a_control_endpoint_names_adapters_and_takes_nothing_else_with_the_question() -> None:
    control = Control(_no_drop, ["cats"])
    (answer,) = [each async for each in control.handle(AdaptersRequest().model_dump(), Context())]
    assert parse(AdaptersReport, answer).adapters == ("cats",)
    (answer,) = [each async for each in control.handle({"command": "adapters", "key": "x"}, Context())]
    assert answer["code"] == "protocol_mismatch"
