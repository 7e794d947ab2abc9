"""What a tier costs: from the question to the committed entry, beside what else there is.

    python -m benchmarks.tiers [--rounds 21] [--without-model]

For 1, 10 and 34 MB, all ways in turn: a memcpy; a plain `preadv` of the file, and with the keyed hash; the
disk tier, its file in the page cache and not; the bare Redis protocol on a socket, whole, and the store tier;
a NIXL READ between two agents, checked and committed, which is the least that another worker's arena can cost
before any message. Then the demo model's encode, the time to index 10,000 entries, and what a disk tier adds
to a miss where nothing comes twice. Every embedding is compared. The last line is one JSON object, in
milliseconds unless named.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from prometheus_client import CollectorRegistry

from benchmarks.measuring import MB, finish, say
from tests.e2e.stack import REPOSITORY
from tests.tiers.bench import redis_running
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.engines.base import EncodeItem, ItemDescription
from trtllm_mm_cache.observability.metrics import Step
from trtllm_mm_cache.runtime.drops import DropWatch
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Header, Sealer
from trtllm_mm_cache.tiers.limits import TierLimits
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.tiers.rules import EntryRules
from trtllm_mm_cache.tiers.storage import Storage
from trtllm_mm_cache.tiers.store import StoreStorage
from trtllm_mm_cache.tiers.stored import StoredTier
from trtllm_mm_cache.transfer import Exporter, Reader, TransferAgent
from trtllm_mm_cache.transfer.checksum import checksum

SIZES_MB = (1, 10, 34)
FINGERPRINT = "ab" * 32
WIDTH = 1024
SEALER = Sealer(b"s" * 32)
Way = Callable[[], Awaitable[None]]


def item(name: str) -> MissingItem:
    """Return the item that an image of this name would be."""
    content = content_digest(name.encode())
    watch = DropWatch(None)
    watch.content = content
    key = embedding_key(content, fingerprint=FINGERPRINT)
    return MissingItem(key, b"", ItemDescription(32, 32), Scope(), watch)


def tier_over(storage: Storage, *, at_use: int = 1) -> StoredTier:
    """Return a tier that stores at this use, with deadlines that a busy machine meets."""
    seconds = Step.new(CollectorRegistry(), "tier", "One call.", "tier", "step")
    limits = TierLimits(lookup_s=5, fetch_s=5, at_use=at_use)
    return StoredTier(storage, EntryRules(SEALER, FINGERPRINT), limits, seconds)


def check(holds: bool) -> None:
    """Stop where an answer is wrong."""
    if not holds:
        raise SystemExit("a wrong answer")


def found(lease: Lease | None) -> Lease:
    """Return the lease, which must be there."""
    check(lease is not None)
    return cast(Lease, lease)


def nothing_to_check(*_: Any) -> None:
    """Every embedding fits."""


class Bench:
    """An arena to fill, another one to READ from, and the tiers."""

    def __init__(self, folder: Path, port: int) -> None:
        self.cache = MultimodalEmbeddingCacheManager(128 * MB)
        self.source = MultimodalEmbeddingCacheManager(128 * MB, name="source")
        transit = MultimodalEmbeddingCacheManager(0, transfer_bytes=MB, name="transit")
        self.receiver = Receiver(self.cache, transit, None, nothing_to_check, CollectorRegistry())
        self.folder = folder
        self.disk_storage = DiskStorage(folder, FINGERPRINT, 1024 * MB)
        self.disk = tier_over(self.disk_storage)
        self.store = tier_over(StoreStorage(f"redis://127.0.0.1:{port}", FINGERPRINT, timeout_s=5))
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def connect(self) -> None:
        """Start the two NIXL agents."""
        self.reading, self.exporting = await TransferAgent.start(), await TransferAgent.start()
        for agent, manager in ((self.reading, self.cache), (self.exporting, self.source)):
            await agent.register(manager.arena.base_address, manager.arena.capacity_bytes)
        self.reader, self.exporter = Reader(self.reading), Exporter(self.exporting, lease_timeout_s=60)

    async def close(self) -> None:
        """End everything."""
        for tier in (self.disk, self.store):
            await tier.close()
        self.socket.close()
        for agent in (self.reading, self.exporting):
            await agent.close(deadline_s=5)
        self.cache.close()
        self.source.close()

    def committed(self, wanted: MissingItem, tensor: torch.Tensor) -> Lease:
        """Put an embedding into the arena."""
        nbytes = tensor.numel() * tensor.element_size()
        reservation = self.cache.reserve(wanted.key.hex, nbytes, owner="benchmark", content=wanted.content)
        reservation.write(tensor)
        return reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape))

    async def kept(self, wanted: MissingItem, tensor: torch.Tensor) -> None:
        """Have both tiers store it."""
        while not self.disk_storage.writes:  # noqa: ASYNC110 - the index is read by a thread of the tier
            await asyncio.sleep(0.01)
        with self.committed(wanted, tensor) as lease:
            for tier in (self.disk, self.store):
                tier.offer(wanted, lease)
            while any(each.offers.waiting[0] for each in (self.disk, self.store)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self.cache.drop(wanted.key.hex)


class Ways:
    """The ways to bring one embedding of so many MB, which each tier keeps. `last` holds what one brought."""

    def __init__(self, bench: Bench, megabytes: int) -> None:
        self.bench = bench
        self.nbytes, self.wanted = megabytes * MB, item(f"{megabytes} MB")
        self.tensor = torch.rand(self.nbytes // 2 // WIDTH, WIDTH).half()
        self.path = bench.disk_storage._folder.path(self.wanted.key.hex)
        self._key = bench.store._storage._key(EntryName(self.wanted.key.hex))  # type: ignore[attr-defined]
        self._extent = bench.cache.reserve("plain", self.nbytes, owner="benchmark")
        self._view = memoryview((ctypes.c_char * self.nbytes).from_address(self._extent.address)).cast("B")
        self._plain = memoryview(self.tensor.view(torch.uint8).flatten().numpy()).cast("B")
        self.last: list[Lease] = []
        source = bench.source.reserve("source", self.nbytes, owner="benchmark")
        source.write(self.tensor)
        metadata = EmbeddingMetadata(checksum=checksum(source.address, self.nbytes))
        source.commit(dtype=self.tensor.dtype, shape=tuple(self.tensor.shape), metadata=metadata).release()

    def close(self) -> None:
        """Free what they used."""
        self._extent.abandon()
        self.bench.source.drop("source")

    def by_name(self) -> dict[str, Way]:
        """Return all of them; those that begin with `cold` find the file out of the page cache."""
        return {
            "memcpy": self._memcpy,
            "preadv": self._preadv,
            "preadv_and_hash": partial(self._preadv, hashed=True),
            "disk": partial(self._from_tier, self.bench.disk),
            "cold_preadv": self._preadv,
            "cold_disk": partial(self._from_tier, self.bench.disk),
            "raw_protocol": self._raw_protocol,
            "store": partial(self._from_tier, self.bench.store),
            "nixl_read": self._nixl_read,
        }

    def settle(self) -> None:
        """Compare what was brought, and forget it."""
        for lease in self.last:
            check(torch.equal(lease.tensor, self.tensor))
            lease.release()
        self.last.clear()
        self.bench.cache.drop(self.wanted.key.hex)

    async def _memcpy(self) -> None:
        self._view[:] = self._plain

    async def _preadv(self, *, hashed: bool = False) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        check(os.preadv(descriptor, [self._view], HEADER_BYTES) == self.nbytes)
        os.close(descriptor)
        if hashed:
            SEALER.payload_seal(self._view)

    async def _from_tier(self, tier: StoredTier) -> None:
        self.last.append(found(await tier.fill(self.wanted, self.bench.receiver.receive)))

    async def _raw_protocol(self) -> None:
        connection = self.bench.socket
        connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(self._key), self._key))
        head = b""
        while b"\r\n" not in head:
            head += connection.recv(1)
        check(int(head[1:]) - HEADER_BYTES == self.nbytes)
        _receive(connection, memoryview(bytearray(HEADER_BYTES)))
        _receive(connection, self._view)
        _receive(connection, memoryview(bytearray(2)))

    async def _nixl_read(self) -> None:
        bench = self.bench
        export = await bench.exporter.export(found(bench.source.lease("source")))
        reservation = bench.cache.reserve(self.wanted.key.hex, self.nbytes, owner="benchmark")
        peer = bench.exporting.metadata
        await bench.reader.read_into(reservation, peer, export, deadline_s=10, finite_dtype="float16")
        self.last.append(reservation.commit(dtype=self.tensor.dtype, shape=tuple(self.tensor.shape)))


async def measure(bench: Bench, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each way, in an order drawn anew each round; the first round warms up."""
    ways = Ways(bench, megabytes)
    await bench.kept(ways.wanted, ways.tensor)
    by_name = ways.by_name()
    times: dict[str, list[float]] = {name: [] for name in by_name}
    names, source_of_order = list(by_name), random.Random(1)
    for number in range(rounds + 1):
        source_of_order.shuffle(names)
        for name in names:
            if name.startswith("cold"):
                _forget(ways.path)
            elif "disk" in name or "preadv" in name:
                ways.path.read_bytes()
            began = time.perf_counter()
            await by_name[name]()
            spent = (time.perf_counter() - began) * 1e3
            if number:
                times[name].append(spent)
            ways.settle()
    ways.close()
    return times


def _receive(from_socket: socket.socket, view: memoryview) -> None:
    while view:
        view = view[from_socket.recv_into(view) :]


def _forget(path: Path) -> None:
    """Have the kernel write a file out and forget its pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def index_seconds(folder: Path, entries: int) -> float:
    """Return how long a writer takes to know `entries` files."""
    storage = DiskStorage(folder, FINGERPRINT, 1024 * MB)
    storage.tidy(_keep)
    for number in range(entries):
        storage.store(EntryName(embedding_key(content_digest(b"%d" % number), fingerprint=FINGERPRINT).hex),
                      bytes(HEADER_BYTES), memoryview(b"x"))  # fmt: skip
    storage.close()
    again = DiskStorage(folder, FINGERPRINT, 1024 * MB)
    began = time.perf_counter()
    again.tidy(_keep)
    spent = time.perf_counter() - began
    check(again.contents().entries == entries)
    again.close()
    return spent


def _keep(data: bytes, key: str) -> Header | None:
    return None


async def added_to_a_miss(bench: Bench) -> float:
    """Return the microseconds that a disk tier adds to a miss of an image that was never seen."""
    wanted = [item(f"new {number}") for number in range(2000)]
    with bench.committed(item("any"), torch.zeros(8, 8)) as lease:
        tier = tier_over(DiskStorage(bench.folder.parent / "unused", FINGERPRINT, MB), at_use=2)
        while not tier._storage.writes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        for each in wanted:
            check(await tier.fill(each, bench.receiver.receive) is None)
            tier.offer(each, lease)
        spent = time.perf_counter() - began
        await tier.close()
    return spent / len(wanted) * 1e6


def demo_encodes(rounds: int) -> Iterator[float]:
    """Yield the milliseconds of the demo model's own encode of a card, preprocessing included."""
    from tools.demo_model.pictures import draw, random_scene
    from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

    engine = TransformersVisionEncoder(
        REPOSITORY / "models/shapes-qwen2-vl", TransformersEngineArgs(device="cpu", torch_threads=1)
    )
    card = draw(random_scene(random.Random(1)))
    for _ in range(rounds):
        began = time.perf_counter()
        engine.encode([engine.preprocess(EncodeItem(card, {}, ""))])
        yield (time.perf_counter() - began) * 1e3
    engine.close()


async def run(rounds: int, *, model: bool, folder: Path, port: int) -> dict[str, Any]:
    """Measure everything."""
    bench = Bench(folder / "entries", port)
    await bench.connect()
    table: dict[str, Any] = {}
    for megabytes in SIZES_MB:
        times = await measure(bench, megabytes, rounds)
        table[f"{megabytes} MB"] = {
            name: {"min": round(min(one), 3), "median": round(statistics.median(one), 3)}
            for name, one in times.items()
        }
        say(f"{megabytes} MB: {table[f'{megabytes} MB']}")
    results: dict[str, Any] = {"rounds": rounds, "ms": table}
    results["added_to_a_miss_us"] = round(await added_to_a_miss(bench), 1)
    results["index_10000_entries_s"] = round(
        await asyncio.to_thread(index_seconds, folder / "many", 10_000), 3
    )
    if model:
        results["demo_encode_ms"] = round(statistics.median(demo_encodes(rounds)), 2)
    await bench.close()
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What tiers cost; see the file.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--without-model", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tiers-") as folder, redis_running() as (port, _):
        results = asyncio.run(
            run(arguments.rounds, model=not arguments.without_model, folder=Path(folder), port=port)
        )
    finish("tiers", results, arguments.out)


if __name__ == "__main__":
    main()
