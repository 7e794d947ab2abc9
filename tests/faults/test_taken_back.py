"""Clients that leave in the middle of a miss: no export waits for its timeout."""

from __future__ import annotations

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from tests.e2e.stack import message, new_image, wait_until
from tests.faults.deployment import Deployment

CLIENTS = 4
REQUESTS = 60
LONGEST_S = 0.4
"""Some leave before their request is read, some after their answer."""
HELD = "trtllm_mm_cache_exports_held"


def begin(deployment: Deployment) -> http.client.HTTPConnection:
    """Ask about a new image; whoever closes the connection leaves."""
    body = {"model": deployment.model.name, "messages": [message(new_image(), "What?")], "max_tokens": 1}
    url = urlsplit(str(deployment.client.base_url))
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", url.path + "chat/completions", json.dumps(body), headers)
    return connection


def stopped(deployment: Deployment) -> float:
    return deployment.pd_metric("trtllm_mm_cache_requests_total", outcome="stopped")


def test_an_answer_on_its_way_when_the_client_leaves_is_released(deployment: Deployment) -> None:
    timed_out, released = deployment.exports("timed_out"), deployment.exports("released")
    deployment.fault("late")
    before = stopped(deployment)
    connections = [begin(deployment) for _ in range(CLIENTS)]
    wait_until(
        lambda: sum(peer.process.metric(HELD) for peer in deployment.peers) == CLIENTS, 30, "not all exported"
    )
    for connection in connections:
        connection.close()
    wait_until(lambda: stopped(deployment) == before + CLIENTS, 30, "the PD worker has not noticed")
    deployment.fault("good")
    deployment.nothing_held()
    assert deployment.exports("timed_out") == timed_out
    assert deployment.exports("released") == released + CLIENTS


def test_no_export_of_a_miss_whose_client_left_waits_for_its_timeout(deployment: Deployment) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    timed_out, before = deployment.exports("timed_out"), stopped(deployment)

    def leave(number: int) -> None:
        connection = begin(deployment)
        time.sleep(random.Random(seed + number).uniform(0, LONGEST_S))  # the moment is what is tried
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(leave, range(REQUESTS)))
    deployment.nothing_held()
    assert stopped(deployment) > before, "none left in the middle"
    assert deployment.exports("timed_out") == timed_out, f"seed {seed}"
