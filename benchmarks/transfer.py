"""How long an embedding takes from one process's arena into another's, beside a memcpy of the same bytes.

    python benchmarks/transfer.py [--transports tcp] [--repeats 25]

Two processes on this machine. For each size, medians in milliseconds over rotating extents of

    memcpy    the same number of bytes inside the reader's arena, one thread
    read      Reader.begin to its outcome: the READ alone
    read_into Reader.read_into: READ and checksum, as the PD worker does it
    export    Exporter.export: the checksum on the encode side, on its first export

and the agent threads' CPU while idle. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from typing import Any, cast

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.transfer import Export, Exporter, PeerMetadata, Reader, TransferAgent

MB = 1024**2
SIZES = {"1 MB": MB, "9.8 MB": int(9.8 * MB), "33.6 MB": int(33.6 * MB)}
ARENA_BYTES = 320 * MB


async def make_side(transports: str | None) -> tuple[MultimodalEmbeddingCacheManager, TransferAgent]:
    """Make an arena and a NIXL agent that has it registered."""
    manager = MultimodalEmbeddingCacheManager(ARENA_BYTES)
    agent = await TransferAgent.start({"UCX_TLS": transports} if transports else None)
    await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
    return manager, agent


async def serve(transports: str | None) -> None:
    """Export a new entry of the size on each input line."""
    manager, agent = await make_side(transports)
    exporter = Exporter(agent, lease_timeout_s=60)
    print(json.dumps(agent.metadata.to_wire()), flush=True)
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        number += 1
        reservation = manager.reserve(str(number), int(line), owner="benchmark")
        view = reservation.view
        view.random_()
        lease = reservation.commit(dtype=view.dtype, shape=(1, view.numel()))
        began = time.perf_counter()
        export = await exporter.export(lease)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, **dataclasses.asdict(export)}), flush=True)
    await agent.close(deadline_s=1)


class RemoteExporter:
    """The other process."""

    async def start(self, transports: str | None) -> PeerMetadata:
        """Start it and return its NIXL metadata."""
        arguments = ["--serve", *(["--transports", transports] if transports else [])]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._requests = cast(asyncio.StreamWriter, self._process.stdin)
        self._answers = cast(asyncio.StreamReader, self._process.stdout)
        return PeerMetadata.from_wire(await self._answer())

    async def export(self, nbytes: int) -> tuple[Export, float]:
        """Have a new entry exported; return it and the seconds that took over there."""
        self._requests.write(f"{nbytes}\n".encode())
        answer = await self._answer()
        seconds = answer.pop("seconds")
        return Export(**answer), seconds

    async def stop(self) -> None:
        """End it in order."""
        self._requests.close()
        async with asyncio.timeout(10):
            await self._process.wait()

    async def _answer(self) -> Any:
        async with asyncio.timeout(60):
            return json.loads(await self._answers.readline())


async def measure(transports: str | None, repeats: int) -> dict[str, Any]:
    """Run all measurements."""
    manager, agent = await make_side(transports)
    reader, remote = Reader(agent), RemoteExporter()
    peer = await remote.start(transports)
    results: dict[str, Any] = {"transports": transports or "default", "repeats": repeats, "sizes": {}}
    results["idle_cpu_percent"] = round(await idle_cpu_percent(agent), 2)
    for name, nbytes in SIZES.items():
        times: dict[str, list[float]] = {"memcpy": [], "read": [], "read_into": [], "export": []}
        for number in range(repeats):
            source = manager.arena.base_address + number % 4 * nbytes
            target = manager.arena.base_address + ARENA_BYTES - (1 + number % 4) * nbytes
            began = time.perf_counter()
            ctypes.memmove(target, source, nbytes)
            times["memcpy"].append(time.perf_counter() - began)
            for way in ("read", "read_into"):
                export, seconds = await remote.export(nbytes)
                times["export"].append(seconds)
                times[way].append(await timed(way, manager, reader, peer, export))
        results["sizes"][name] = {
            way: round(statistics.median(spent) * 1e3, 3) for way, spent in times.items()
        }
    await remote.stop()
    await agent.close(deadline_s=1)
    manager.close()
    return results


async def timed(
    way: str, manager: MultimodalEmbeddingCacheManager, reader: Reader, peer: PeerMetadata, export: Export
) -> float:
    """READ `export` into an entry that stays in the cache, so that targets rotate through the arena."""
    reservation = manager.reserve(export.token, export.nbytes, owner="benchmark")
    view = reservation.view
    began = time.perf_counter()
    if way == "read":
        read = reader.begin(
            peer,
            remote_address=export.address,
            local_address=reservation.address,
            nbytes=export.nbytes,
            token=export.token,
            deadline_s=10,
        )
        await asyncio.wrap_future(read.outcome)
    else:
        await reader.read_into(reservation, peer, export, deadline_s=10)
    seconds = time.perf_counter() - began
    reservation.commit(dtype=view.dtype, shape=(1, export.nbytes)).release()
    return seconds


async def idle_cpu_percent(agent: TransferAgent) -> float:
    """Return the share of one core that the agent thread takes when there is nothing to do."""

    def thread_seconds(_: object) -> float:
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return usage.ru_utime + usage.ru_stime

    began, before = time.monotonic(), await asyncio.wrap_future(agent.call(thread_seconds))
    await asyncio.sleep(2)
    used = await asyncio.wrap_future(agent.call(thread_seconds)) - before
    return 100 * used / (time.monotonic() - began)


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", help="UCX_TLS for both processes, for example tcp")
    parser.add_argument("--repeats", type=int, default=25, help="READs of each size and kind")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.transports))
        return
    results = asyncio.run(measure(arguments.transports, arguments.repeats))
    print(f"{'ms':>9} {'memcpy':>8} {'read':>8} {'read_into':>10} {'export':>8}   cores: {os.cpu_count()}")
    for name, row in results["sizes"].items():
        print(f"{name:>9} {row['memcpy']:8} {row['read']:8} {row['read_into']:10} {row['export']:8}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
