"""An encode worker's transfer side in a process of its own, driven by JSON lines on stdin and stdout.

Commands are `{"do": name, ...}`; each gets one line as the answer. The clock of its exporter is the real
one plus what `advance_clock` has added.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from typing import Any

import torch

from tests.transfer.embedding import embedding
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.transfer import Exporter, TransferAgent

COUNTERS = ("exported", "acked", "released", "timed_out", "unmatched", "held", "held_bytes")


class ExporterProcess:
    """One arena, one NIXL agent, one exporter; `start_agent` replaces the latter two."""

    def __init__(self, capacity_bytes: int) -> None:
        self.manager = MultimodalEmbeddingCacheManager(capacity_bytes)
        self.agent: TransferAgent | None = None
        self.skew_s = 0.0

    async def start_agent(self, lease_timeout_s: float, transports: str | None) -> dict[str, Any]:
        await self.stop()
        self.manager.clear()
        os.environ.pop("UCX_TLS", None)
        self.agent = await TransferAgent.start({"UCX_TLS": transports} if transports else None)
        await self.agent.register(self.manager.arena.base_address, self.manager.arena.capacity_bytes)
        self.exporter = Exporter(
            self.agent, lease_timeout_s=lease_timeout_s, clock=lambda: time.monotonic() + self.skew_s
        )
        return {"peer": self.agent.metadata.with_arena(self.manager.arena.place).to_wire()}

    async def stop(self) -> None:
        if self.agent is not None:
            await self.agent.close(deadline_s=0)

    async def export(self, key: str, nbytes: int) -> dict[str, Any]:
        lease = self.manager.lease(key)
        if lease is None:
            assert self.manager.set(key, CachedEmbedding(embedding(key, nbytes)))
            lease = self.manager.lease(key)
        assert lease is not None
        return dataclasses.asdict(await self.exporter.export(lease))

    async def advance_clock(self, seconds: float) -> dict[str, Any]:
        self.skew_s += seconds
        return {}

    async def release(self, token: str) -> dict[str, Any]:
        return {"held": self.exporter.release(token)}

    async def statistics(self) -> dict[str, Any]:
        manager = self.manager.statistics()
        exports = {name: getattr(self.exporter, name) for name in COUNTERS}
        return exports | {"leased_bytes": manager.leased_bytes + manager.withdrawn_bytes}

    async def clear(self) -> dict[str, Any]:
        return {"dropped": self.manager.clear()}

    async def close(self, deadline_s: float) -> dict[str, Any]:
        assert self.agent is not None
        began = time.monotonic()
        await self.agent.close(deadline_s=deadline_s)
        return {"seconds": time.monotonic() - began}


async def main(capacity_bytes: int) -> None:
    process = ExporterProcess(capacity_bytes)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer = await getattr(process, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)
    await process.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(int(sys.argv[1])))
