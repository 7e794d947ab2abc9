"""Connections that say nothing, at a low limit of descriptors: they are bounded, and everything goes on."""

from __future__ import annotations

import resource
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import wait_until
from tests.redteam.deployment import Deployment, deployed, descriptors, idle_connections
from tests.services import WITH_US
from trtllm_mm_cache.runtime.status import MAX_CONNECTIONS

LIMIT, CONNECTIONS = 256, 300


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment whose processes may open few files."""
    prefix = (*WITH_US, "prlimit", f"--nofile={LIMIT}:{LIMIT}")
    with deployed(tmp_path_factory.mktemp("limited"), prefix=prefix) as running:
        yield running


def test_idle_connections_to_the_system_ports_cost_no_request(limited: Deployment, deal: Deal) -> None:
    workers = (limited.pd, limited.encode)
    before = {worker.name: descriptors(worker) for worker in workers}
    idle = [each for worker in workers for each in idle_connections(worker.system_port, CONNECTIONS)]
    try:
        for _ in range(3):
            asked = deal()
            assert limited.ask(*asked.parts) == asked.answer
        for worker in workers:
            assert worker.process.metric("trtllm_mm_cache_capacity_bytes") > 0
            for path in ("live", "health"):
                url = f"http://127.0.0.1:{worker.system_port}/{path}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    assert answer.status == 200
            assert descriptors(worker) < before[worker.name] + MAX_CONNECTIONS + 32
    finally:
        close_all(idle)


def test_a_connection_that_says_nothing_is_closed(deployment: Deployment) -> None:
    (idle,) = idle_connections(deployment.pd.system_port, 1)
    with idle:
        idle.settimeout(30)
        assert idle.recv(1) == b""


def test_half_a_request_is_no_way_to_stay(deployment: Deployment) -> None:
    (idle,) = idle_connections(deployment.pd.system_port, 1)
    with idle:
        idle.settimeout(60)
        idle.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n")
        assert idle.recv(1) == b""


def test_connections_that_ended_give_their_places_back(deployment: Deployment) -> None:
    before = descriptors(deployment.pd)
    for _ in range(4):
        close_all(idle_connections(deployment.pd.system_port, MAX_CONNECTIONS))
        assert deployment.pd.process.metric("trtllm_mm_cache_capacity_bytes") > 0
    wait_until(lambda: descriptors(deployment.pd) <= before + 4, 10, "descriptors were not given back")


def test_a_process_may_open_as_many_files_as_its_hard_limit_allows(deployment: Deployment) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for service in deployment.services:
        soft, most = resource.prlimit(service.popen.pid, resource.RLIMIT_NOFILE)
        assert (soft, most) == (min(hard, 65_536), hard)


def test_the_system_port_tells_no_addresses(deployment: Deployment) -> None:
    for path in ("", "health", "live", "metadata", "engine/x", "metrics_endpoints"):
        url = f"http://127.0.0.1:{deployment.pd.system_port}/{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            text = error.read().decode()
        assert "127.0.0.1" not in text
        assert "control" not in text
        assert "generate" not in text


def close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()
