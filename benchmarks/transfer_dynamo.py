"""Dynamo's two ends of `transfer.py`: the senders and receivers of its `embedding_transfer` module.

Modules are loaded from their files: the package around them imports what its image and audio loaders need.
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

FOLDER_VARIABLE = "DYNAMO_TRANSFER_FOLDER"
KINDS = {"local": "Local", "nixl_write": "NixlWrite", "nixl_read": "NixlRead"}
TRANSFER = "multimodal/embedding_transfer"
CACHE = "memory/multimodal_embedding_cache_manager"
WIDTH = 1024


def dynamo_module(name: str) -> Any:
    """Load a module of Dynamo's from the folder that the environment names."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    sys.path.append(str(folder))  # after ours: what it imports from ai-dynamo-runtime is the installed one
    specification = importlib.util.spec_from_file_location(
        f"dynamo_{Path(name).name}", folder / f"dynamo/common/{name}.py"
    )
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
    sender = getattr(dynamo_module(TRANSFER), f"{KINDS[kind]}EmbeddingSender")()
    rows = ARENA_BYTES // 8 // WIDTH
    yield DynamoSender(sender, [torch.rand(rows, WIDTH).half() for _ in range(2)])


@dataclass
class DynamoReceiver(Receiver):
    """Seconds: from the reply to the tensor that `receive_embeddings` returns, and to an entry in the cache.

    The entry is a clone, as in Dynamo's prefill worker (dynamo/vllm/multimodal_utils/prefill_worker_utils.py,
    1.6.1), because the tensor lies in a buffer or file that is given back; the cache is Dynamo's.
    """

    module: Any
    receiver: Any
    connection: Connection
    cache: Any
    entry: Any
    count: int = 0

    async def receive(self, nbytes: int) -> Times:
        """Receive one embedding and release it."""
        reply, send_s = await ask(self.connection, nbytes)
        replied_at = time.perf_counter()
        request = self.module.TransferRequest.model_validate(reply)
        number, tensor = await self.receiver.receive_embeddings(request)
        received_at = time.perf_counter()
        self.count += 1
        self.cache.set(str(self.count), self.entry(tensor=tensor.clone()))
        committed_at = time.perf_counter()
        if tensor.nbytes != nbytes:
            raise RuntimeError(f"{tensor.nbytes} bytes came instead of {nbytes}")
        self.receiver.release_tensor(number)
        return Times(send_s, received_at - replied_at, committed_at - replied_at)


@asynccontextmanager
async def dynamo_receiver(kind: str, connection: Connection) -> AsyncIterator[Receiver]:
    """Make one of its receivers."""
    module = dynamo_module(TRANSFER)
    caching = dynamo_module(CACHE)
    if kind == "nixl_write":
        receiver = module.NixlWriteEmbeddingReceiver(buffer_size=ARENA_BYTES)
        receiver.transfer_tensor.fill_(1)
    elif kind == "nixl_read":
        receiver = module.NixlReadEmbeddingReceiver(max_items=0)
    else:
        receiver = module.LocalEmbeddingReceiver()
    cache = caching.MultimodalEmbeddingCacheManager(ARENA_BYTES)
    yield DynamoReceiver(module, receiver, connection, cache, caching.CachedEmbedding)
