"""The system port by itself: what it answers, and to how many."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.e2e.stack import free_port, wait_until
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.runtime.status import MAX_CONNECTIONS, StatusServer
from trtllm_mm_cache.settings import EncodeSettings


def settings(port: int | None) -> EncodeSettings:
    return EncodeSettings(model_path="m", system_port=port)


@pytest.fixture
def server() -> Iterator[StatusServer]:
    server = StatusServer(settings(free_port()))
    yield server
    server.close()


def ask(server: StatusServer, path: str, method: str = "GET") -> tuple[int, str]:
    assert server.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_a_worker_that_loads_lives_and_is_not_ready(server: StatusServer) -> None:
    assert [ask(server, path)[0] for path in ("/live", "/health", "/metrics")] == [200, 503, 200]
    server.ready, server.render = True, lambda: "a_metric 1\n"
    assert ask(server, "/health") == (200, '{"status": "ready"}\n')
    assert ask(server, "/metrics?a=b") == (200, "a_metric 1\n")
    assert ask(server, "/metrics", "HEAD") == (200, "")
    assert ask(server, "/metadata")[0] == 404
    assert ask(server, "/live", "POST")[0] == 501


def test_without_a_port_there_is_no_server() -> None:
    server = StatusServer(settings(None))
    assert server.port is None
    server.close()


def test_a_port_that_is_taken_is_said_by_name(server: StatusServer) -> None:
    with pytest.raises(ConfigurationError, match=r"--system-port \d+ .*set another one"):
        StatusServer(settings(server.port))


def test_the_oldest_of_too_many_connections_is_closed_and_every_request_answered(
    server: StatusServer,
) -> None:
    assert server.port is not None
    idle = [
        socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(2 * MAX_CONNECTIONS)
    ]
    assert ask(server, "/live")[0] == 200
    assert [one.recv(1) for one in idle[:MAX_CONNECTIONS]] == [b""] * MAX_CONNECTIONS
    for one in idle:
        one.close()
    wait_until(lambda: ask(server, "/live")[0] == 200, 10, "no answer after the idle ones had gone")


def test_a_flood_of_connections_leaves_room_for_the_next_one(server: StatusServer) -> None:
    """Who finds none asks again after a second, and that is all the time that a probe of Kubernetes has."""
    assert server.port is not None
    address = ("127.0.0.1", server.port)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(300)]
        assert [retransmissions(one) for one in idle] == [0] * len(idle)


def retransmissions(connection: socket.socket) -> int:
    """Return how many segments were sent again, its first one included: tcpi_total_retrans of linux/tcp.h."""
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", information, 100)[0])
