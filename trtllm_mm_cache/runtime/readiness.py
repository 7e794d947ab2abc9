"""How a worker says that it serves: to probes, and to the process that started it."""

from __future__ import annotations

import gc
import os
import socket

from trtllm_mm_cache.runtime.status import StatusServer


def announce_ready(status: StatusServer) -> None:
    """Let `/health` answer 200, and tell the supervisor (`notify`).

    What was loaded until now is taken out of the garbage collector's sight: it stays for good.
    """
    gc.freeze()
    status.ready = True
    notify("READY=1")


def notify(state: str) -> None:
    """Send `state` to the supervisor that NOTIFY_SOCKET names: systemd's protocol, which `serve` speaks too.

    Does nothing where there is none. Raises `OSError` when it is gone.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # Linux' abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall(state.encode())
