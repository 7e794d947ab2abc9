"""How `serve` learns that a process serves: it says so (systemd's protocol), or a URL of it answers."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct

_PROBE_S = 2.0
_PROBE_PAUSE_S = 0.1
_CREDENTIALS = struct.Struct("3i")


def listen() -> tuple[str, socket.socket]:
    """Return an address for NOTIFY_SOCKET and the socket behind it: abstract, for paths may be too long."""
    name = f"mm-cache-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    listener.bind("\0" + name)
    return "@" + name, listener


async def says_ready(listener: socket.socket) -> None:
    """Return when a process of this user has said READY=1, and close `listener`."""
    with listener:
        while True:
            await _readable(listener)
            text, ancillary, _, _ = listener.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
            users = [
                _CREDENTIALS.unpack_from(data)[1]
                for level, kind, data in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            ]
            if users == [os.geteuid()] and b"READY=1" in text.splitlines():
                return


async def answers(url: str) -> None:
    """Return when there is an answer at `url`, whatever it says."""
    import httpx2

    async with httpx2.AsyncClient(trust_env=False, timeout=_PROBE_S) as client:  # loopback needs no proxy
        while True:
            try:
                await client.get(url)
            except httpx2.HTTPError:
                await asyncio.sleep(_PROBE_PAUSE_S)
            else:
                return


async def _readable(listener: socket.socket) -> None:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(listener)
