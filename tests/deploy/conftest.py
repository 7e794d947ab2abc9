"""Ports for the processes that these tests start."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import pytest


@pytest.fixture
def system_port() -> Callable[[], int]:
    """Return a maker of ports that are free on loopback, below 32768: Dynamo reads no larger system port."""
    given: set[int] = set()

    def make() -> int:
        while True:
            port = random.randrange(20000, 32768)
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            if port not in given:
                given.add(port)
                return port

    return make
