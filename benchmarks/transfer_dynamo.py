"""Dynamo's two ends of `transfer.py`: the senders and receivers of its `embedding_transfer` module.

The module is loaded from its file: the package around it imports what its image and audio loaders need.
Each is set up as Dynamo's own factories do, except that the receiver of NIXL WRITEs gets a ring of the size
that our arena has, in place of 8 GB, with its pages touched before the first transfer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.transfer_ends import ARENA_BYTES, Receiver, Sender, Times, ask

from trtllm_mm_cache.transfer.checksum import checksum

FOLDER_VARIABLE = "DYNAMO_TRANSFER_FOLDER"
KINDS = {"local": "Local", "nixl_write": "NixlWrite", "nixl_read": "NixlRead"}
WIDTH = 1024


def embedding_transfer() -> Any:
    """Load Dynamo's module from the folder that the environment names."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    sys.path.append(str(folder))  # after ours: what it imports from ai-dynamo-runtime is the installed one
    path = folder / "dynamo/common/multimodal/embedding_transfer.py"
    specification = importlib.util.spec_from_file_location("dynamo_embedding_transfer", path)
    if specification is None or specification.loader is None:
        raise SystemExit(f"there is no ai-dynamo in {folder}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@dataclass
class DynamoSender(Sender):
    """Seconds: of `send_embeddings`, with the embedding left where it is, as its encode worker does."""

    sender: Any
    ready: list[torch.Tensor]
    sent: list[Awaitable[None]] = field(default_factory=list)

    async def reply(self, request: Any) -> tuple[Any, float]:
        """Send an embedding of `request` bytes."""
        self.ready.reverse()
        embedding = self.ready[0][: int(request) // (2 * WIDTH)]
        began = time.perf_counter()
        transfer, sent = await self.sender.send_embeddings(embedding, stage_embeddings=True)
        seconds = time.perf_counter() - began
        self.sent.append(sent)  # a future that nobody holds would be collected before the READ
        return transfer.model_dump(), seconds


@asynccontextmanager
async def dynamo_sender(kind: str) -> AsyncIterator[Sender]:
    """Make one of its senders."""
    sender = getattr(embedding_transfer(), f"{KINDS[kind]}EmbeddingSender")()
    rows = ARENA_BYTES // 8 // WIDTH
    yield DynamoSender(sender, [torch.rand(rows, WIDTH).half() for _ in range(2)])


@dataclass
class DynamoReceiver(Receiver):
    """Seconds: from the reply to the tensor that `receive_embeddings` returns. It is not cached yet.

    `maps_only`: the receiver maps a file and reads nothing, so the bytes are read once here, as ours are.
    """

    module: Any
    receiver: Any
    connection: Connection
    maps_only: bool

    async def receive(self, nbytes: int) -> Times:
        """Receive one embedding and release it."""
        reply, send_s = await ask(self.connection, nbytes)
        replied_at = time.perf_counter()
        request = self.module.TransferRequest.model_validate(reply)
        number, tensor = await self.receiver.receive_embeddings(request)
        if self.maps_only:
            checksum(tensor.data_ptr(), tensor.nbytes)
        there_at = time.perf_counter()
        if tensor.nbytes != nbytes:
            raise RuntimeError(f"{tensor.nbytes} bytes came instead of {nbytes}")
        self.receiver.release_tensor(number)
        return Times(send_s=send_s, receive_s=there_at - replied_at)


@asynccontextmanager
async def dynamo_receiver(kind: str, connection: Connection) -> AsyncIterator[Receiver]:
    """Make one of its receivers."""
    module = embedding_transfer()
    if kind == "nixl_write":
        receiver = module.NixlWriteEmbeddingReceiver(buffer_size=ARENA_BYTES)
        receiver.transfer_tensor.fill_(1)
    elif kind == "nixl_read":
        receiver = module.NixlReadEmbeddingReceiver(max_items=0)
    else:
        receiver = module.LocalEmbeddingReceiver()
    yield DynamoReceiver(module, receiver, connection, maps_only=kind == "local")
