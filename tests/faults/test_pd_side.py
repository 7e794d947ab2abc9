"""PD workers that are killed in each step of a request, or stand still, and what they leave behind."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import pytest

from tests.e2e.cards import Asked, Deal
from tests.e2e.stack import wait_until
from tests.faults.asking import LONG, answers, report
from tests.faults.deployment import Deployment
from tests.services import Service


def shared_memory_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"torch_{pid}_*"))  # noqa: S108 - where the arenas are


def restart_pd(deployment: Deployment, asked: Asked) -> None:
    """Start a PD worker after the last one was killed; it must serve, and the dead one's memory be gone."""
    dead = deployment.pd.popen
    dead.wait(10)
    deployment.fault("good")
    deployment.pd.start()
    deployment.pd.wait_ready()
    began = time.monotonic()
    wait_until(lambda: answers(deployment, asked), 20, "the restarted PD worker did not serve")
    report("PD worker restarted, serves after", began)
    wait_until(lambda: not shared_memory_of(dead.pid), 10, "the dead worker's arena is still there")
    deployment.nothing_held()


def stands_still(service: Service) -> bool:
    return Path(f"/proc/{service.popen.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def keep_asking(deployment: Deployment, ask: Callable[[], object]) -> None:
    """Ask until the PD worker is dead: for ten seconds the frontend also knows the one that died before."""
    while deployment.pd.alive:
        with contextlib.suppress(openai.APIError):
            ask()


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("before the answer", "held"),
        pytest.param("between answer and READ", "killed-after", marks=LONG),
        ("in the READ", "frozen-after"),
        pytest.param("generating", "good", marks=LONG),
    ],
)
def test_a_pd_worker_killed_at_any_step_leaves_no_lease_and_its_successor_serves(
    deployment: Deployment, deal: Deal, step: str, fault: str
) -> None:
    asked, pd = deal(), deployment.pd
    assert shared_memory_of(pd.popen.pid)
    ask: Callable[[], object] = partial(deployment.ask, asked)
    if step == "generating":
        ask = partial(deployment.say, "Tell me everything", max_tokens=400, extra_body={"ignore_eos": True})
    deployment.fault(fault, str(pd.popen.pid) if fault == "killed-after" else "0")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(keep_asking, deployment, ask)
        match step:
            case "before the answer":
                flights = "trtllm_mm_cache_flights_in_progress"
                wait_until(lambda: deployment.pd_metric(flights) == 1, 20, "no flight began")
            case "between answer and READ":
                pd.popen.wait(20)
            case "in the READ":
                wait_until(lambda: any(map(stands_still, deployment.peers)), 20, "no peer stands still")
            case "generating":
                running = "trtllm_mm_cache_requests_in_flight"
                wait_until(lambda: deployment.pd_metric(running) == 1, 20, "nothing is generated")
        pd.kill()
        for peer in deployment.peers:
            peer.signal(signal.SIGCONT)
        request.result(30)
    restart_pd(deployment, asked)


def listed(deployment: Deployment, *words: str) -> set[str]:
    """The names of discovery's entries for endpoints that have one of `words` in their names."""
    entries = deployment.folder / "discovery/v1/instances"
    return {path.name for path in entries.iterdir() if any(word in path.name for word in words)}


def test_workers_that_stood_still_for_long_are_found_again(deployment: Deployment, deal: Deal) -> None:
    """Discovery drops what stands still for ten seconds; nobody but the worker can bring itself back."""
    asked = deal()
    assert len(listed(deployment, "encode", "pd")) >= 3
    frozen = [deployment.pd, *deployment.peers]
    for service in frozen:
        service.signal(signal.SIGSTOP)
    wait_until(
        lambda: not listed(deployment, "encode", "pd"), 40, "discovery still lists workers that stand still"
    )
    for service in frozen:
        service.signal(signal.SIGCONT)
    began = time.monotonic()
    wait_until(lambda: answers(deployment, asked), 60, "no worker was found again")
    report("workers thawed after discovery had dropped them, serve after", began)
    deployment.nothing_held()


@LONG
def test_a_worker_that_stands_still_at_birth_is_found_when_it_goes_on(
    deployment: Deployment, deal: Deal
) -> None:
    """Stopped as soon as it is on discovery's list, it has not seen itself there when discovery drops it."""
    pd = deployment.pd
    pd.kill()
    wait_until(lambda: not listed(deployment, "pd"), 40, "discovery still lists the dead PD worker")
    pd.start()
    deadline = time.monotonic() + 60
    while not listed(deployment, "pd%2Fgenerate"):  # without a pause: a moment later it has seen itself there
        assert time.monotonic() < deadline, "the PD worker is not listed"
    pd.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not listed(deployment, "pd"), 40, "discovery still lists who stands still")
    finally:
        pd.signal(signal.SIGCONT)
    began = time.monotonic()
    asked = deal()
    wait_until(lambda: answers(deployment, asked), 60, "the PD worker was not found")
    report("PD worker that stood still at birth serves after", began)
    assert "discovery has lost this worker" in pd.log.read_text()
    deployment.nothing_held()
