"""What an end of `transfer.py` is: a sender on the encode side, a receiver on the PD side."""

from __future__ import annotations

import asyncio
import ctypes
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

MB = 1024**2
ARENA_BYTES = 320 * MB
WAYS = ("ours", "ours_nixl", "nixl_write", "nixl_read", "local")


@dataclass(frozen=True)
class Times:
    """Seconds of one embedding before the reply, on the encode side, and after it, on the PD side.

    `receive_s` until its tensor is there, `commit_s` until it is in the cache.
    """

    send_s: float
    receive_s: float
    commit_s: float


class Sender(ABC):
    """The encode side."""

    @abstractmethod
    async def reply(self, request: Any) -> tuple[Any, float]:
        """Make an embedding ready; return the reply and the seconds that it took."""


class Receiver(ABC):
    """The PD side."""

    @abstractmethod
    async def receive(self, nbytes: int) -> Times:
        """Ask the other end for an embedding of `nbytes` bytes and take it."""


async def ask(connection: Connection, request: Any) -> Any:
    """Send a request to the other end and return its answer."""
    connection.send(request)
    return await asyncio.to_thread(connection.recv)


class Memcpy:
    """Copies within memory that is there, elsewhere each time, as an arena's extents are."""

    def __init__(self) -> None:
        self._memory = torch.ones(ARENA_BYTES, dtype=torch.uint8)
        self._count = 0

    def seconds(self, nbytes: int) -> float:
        """Copy `nbytes` bytes, one thread, and return how long that took."""
        self._count += 1
        start = self._memory.data_ptr()
        source = start + self._count % 4 * nbytes
        target = start + ARENA_BYTES - (1 + self._count % 4) * nbytes
        began = time.perf_counter()
        ctypes.memmove(target, source, nbytes)
        return time.perf_counter() - began
