"""Encode workers that die, stand still, never answer or come back, behind a real frontend and PD worker."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import wait_until
from tests.faults.asking import LONG, ask_until_called, report
from tests.faults.deployment import ENCODE_TIMEOUT_S, Deployment


@pytest.mark.parametrize(
    "fault",
    ["killed", pytest.param("killed-after", marks=LONG), "frozen", pytest.param("frozen-after", marks=LONG)],
)
def test_an_encode_worker_that_dies_or_stands_still_costs_a_retry_and_is_used_again(
    deployment: Deployment, deal: Deal, fault: str
) -> None:
    victim = deployment.peers[0]
    deployment.fault(fault, peers=[victim])
    retries = deployment.pd_metric("trtllm_mm_cache_encode_retries_total")
    while deployment.pd_metric("trtllm_mm_cache_encode_retries_total") == retries:
        asked = deal()
        assert deployment.ask(asked) == asked.answer
    deployment.fault("good")
    if fault.startswith("killed"):
        victim.popen.wait(10)
        victim.start()
        victim.wait_ready()
    else:
        victim.signal(signal.SIGCONT)
    began = time.monotonic()
    ask_until_called(deployment, deal, victim)
    report(f"encode worker {fault}, used again after", began)
    deployment.nothing_held()


def test_no_encode_worker_is_a_503_at_once_that_the_client_retries_by_itself(
    deployment: Deployment, deal: Deal
) -> None:
    cached, asked = deal(), deal()
    assert deployment.ask(cached) == cached.answer
    deployment.fault("busy")
    statuses: list[int] = []
    headers: list[httpx2.Headers] = []

    def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)
        headers.append(response.headers)
        if len(statuses) == 2:
            deployment.fault("good")

    with (
        openai.DefaultHttpxClient(event_hooks={"response": [note]}) as http,
        openai.OpenAI(
            base_url=str(deployment.client.base_url), api_key="none", http_client=http, max_retries=5
        ) as client,
    ):
        assert deployment.ask(asked, client) == asked.answer
    assert statuses == [503, 503, 200]
    assert headers[0]["retry-after"] == "1"
    assert deployment.ask(cached) == cached.answer
    deployment.nothing_held()


def test_an_encode_worker_that_never_answers_meets_the_deadline_and_misses_alone_wait(
    deployment: Deployment, deal: Deal
) -> None:
    cached, asked = deal(), deal()
    assert deployment.ask(cached) == cached.answer
    deployment.fault("silent")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(deployment.ask, asked)
        wait_until(
            lambda: deployment.pd_metric("trtllm_mm_cache_flights_in_progress") == 1, 10, "no flight began"
        )
        assert deployment.ask(cached) == cached.answer, "a hit waits for no worker"
        assert deployment.say("Hello")
        with pytest.raises(openai.InternalServerError) as refused:
            waiting.result(ENCODE_TIMEOUT_S + 20)
    assert refused.value.status_code == 503
    deployment.fault("good")
    assert deployment.ask(asked) == asked.answer
    deployment.nothing_held()
