"""One end of `transfer.py`, in a process of its own.

    python -m benchmarks.transfer_process send|receive WAY SOCKET

A sender answers requests on the socket until the receiver closes it. A receiver reads lines of
`nbytes repeats` from stdin and answers each with one JSON line: the seconds of each repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from multiprocessing.connection import Client, Connection, Listener

import torch

from benchmarks.transfer_ends import Memcpy, Receiver, Sender


def sender_of(way: str) -> AbstractAsyncContextManager[Sender]:
    """Return the sender of a way."""
    if way.startswith("ours"):
        from benchmarks.transfer_ours import our_sender

        return our_sender()
    from benchmarks.transfer_dynamo import dynamo_sender

    return dynamo_sender(way)


def receiver_of(way: str, connection: Connection) -> AbstractAsyncContextManager[Receiver]:
    """Return the receiver of a way."""
    if way.startswith("ours"):
        from benchmarks.transfer_ours import our_receiver

        return our_receiver(connection, way)
    from benchmarks.transfer_dynamo import dynamo_receiver

    return dynamo_receiver(way, connection)


async def send(way: str, socket: str) -> None:
    """Answer requests until the other end closes."""
    async with sender_of(way) as sender:
        with Listener(socket, family="AF_UNIX") as listener:
            print("listening", flush=True)
            with await asyncio.to_thread(listener.accept) as connection, contextlib.suppress(EOFError):
                while True:
                    connection.send(await sender.reply(await asyncio.to_thread(connection.recv)))


async def receive(way: str, socket: str) -> None:
    """Measure what each line of stdin says."""
    memcpy = Memcpy()
    with Client(socket, family="AF_UNIX") as connection:
        async with receiver_of(way, connection) as receiver:
            print("connected", flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                nbytes, repeats = (int(word) for word in line.split())
                rounds = []
                for _ in range(repeats):
                    memcpy_s = memcpy.seconds(nbytes)
                    rounds.append({"memcpy_s": memcpy_s, **asdict(await receiver.receive(nbytes))})
                print(json.dumps(rounds), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run({"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:4]))
