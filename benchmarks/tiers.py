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


def tier_over(storage: Storage) -> StoredTier:
    """Return a tier that stores at once, with deadlines that a busy machine meets."""
    seconds = Step.new(CollectorRegistry(), "tier", "One call.", "tier", "step")
    limits = TierLimits(lookup_s=5, fetch_s=5, at_use=1)
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


async def measure(  # noqa: PLR0915 - the ways, one after the other
    bench: Bench, megabytes: int, rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each way."""
    tensor = torch.rand(megabytes * MB // 2 // WIDTH, WIDTH).half()
    nbytes, wanted = megabytes * MB, item(f"{megabytes} MB")
    await bench.kept(wanted, tensor)
    path = bench.disk_storage._path(wanted.key.hex)
    key = bench.store._storage._key(EntryName(wanted.key.hex))  # type: ignore[attr-defined]
    extent = bench.cache.reserve("plain", nbytes, owner="benchmark")
    view = memoryview((ctypes.c_char * nbytes).from_address(extent.address)).cast("B")
    plain = memoryview(tensor.view(torch.uint8).flatten().numpy()).cast("B")

    async def from_tier(tier: StoredTier) -> None:
        lease = await tier.fill(wanted, bench.receiver.receive)
        last.append(found(lease))

    async def memcpy() -> None:
        view[:] = plain

    async def preadv(*, hashed: bool = False) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        check(os.preadv(descriptor, [view], HEADER_BYTES) == nbytes)
        os.close(descriptor)
        if hashed:
            SEALER.payload_seal(view)

    async def raw_protocol() -> None:
        bench.socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        head = b""
        while b"\r\n" not in head:
            head += bench.socket.recv(1)
        wants = int(head[1:]) - HEADER_BYTES
        check(wants == nbytes)
        _receive(bench.socket, memoryview(bytearray(HEADER_BYTES)))
        _receive(bench.socket, view)
        _receive(bench.socket, memoryview(bytearray(2)))

    async def read() -> None:
        export = await bench.exporter.export(found(bench.source.lease("source")))
        reservation = bench.cache.reserve(wanted.key.hex, nbytes, owner="benchmark")
        peer = bench.exporting.metadata
        await bench.reader.read_into(reservation, peer, export, deadline_s=10, finite_dtype="float16")
        last.append(reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape)))

    source = bench.source.reserve("source", nbytes, owner="benchmark")
    source.write(tensor)
    metadata = EmbeddingMetadata(checksum=checksum(source.address, nbytes))
    source.commit(dtype=tensor.dtype, shape=tuple(tensor.shape), metadata=metadata).release()
    last: list[Lease] = []
    ways: dict[str, Way] = {
        "memcpy": memcpy,
        "preadv": preadv,
        "preadv_and_hash": lambda: preadv(hashed=True),
        "disk": lambda: from_tier(bench.disk),
        "cold_preadv": preadv,
        "cold_disk": lambda: from_tier(bench.disk),
        "raw_protocol": raw_protocol,
        "store": lambda: from_tier(bench.store),
        "nixl_read": read,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    names, source_of_order = list(ways), random.Random(1)
    for number in range(rounds + 1):
        source_of_order.shuffle(names)
        for name in names:
            if name.startswith("cold"):
                _forget(path)
            elif "disk" in name or "preadv" in name:
                path.read_bytes()
            began = time.perf_counter()
            await ways[name]()
            spent = (time.perf_counter() - began) * 1e3
            if number:
                times[name].append(spent)
            for lease in last:
                check(torch.equal(lease.tensor, tensor))
                lease.release()
            last.clear()
            bench.cache.drop(wanted.key.hex)
    extent.abandon()
    bench.source.drop("source")
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
        tier = tier_over(DiskStorage(bench.disk_storage._folder.parent / "unused", FINGERPRINT, MB))
        while not tier._storage.writes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        tier.offers._at_use = 2
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
