"""Ports on this machine."""

from __future__ import annotations

import random
import socket

# Dynamo reads DYN_SYSTEM_PORT as a signed 16-bit number.
_SYSTEM_PORTS = range(20000, 32768)


def free_port() -> int:
    """Return a port for a process's metrics that is free on loopback now."""
    ports = random.sample(_SYSTEM_PORTS, len(_SYSTEM_PORTS))
    return next(port for port in ports if bind_problem(port) is None)


def bind_problem(port: int, host: str = "127.0.0.1") -> OSError | None:
    """Return why a server could not listen on `port` of `host` now, or None."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
