"""Handing a cached embedding to another process, beside the first hand-off of an ordinary tensor.

    python benchmarks/cache_handoff.py [--repeats 21]

Both go by torch's own reduction with the file-system strategy, which is what an inference engine does
with a CPU tensor: for a view of the arena it writes a file name and an offset, for an ordinary tensor it
first makes a shared file and copies the tensor into it. For each size medians in milliseconds of

    make   tensor to bytes that another process understands
    open   those bytes to a tensor in the other process, its first and last element read, and the answer
           back over a pipe

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import pickle
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing
from measuring import MB, finish, median_ms, median_ratio, say

from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager

SIZES = {"1 MB": MB, "4 MB": 4 * MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
ENTRIES = 4
WAYS = ("arena view", "ordinary tensor")


def open_what_comes(connection: Connection) -> None:
    """Open every handle, answer with its first and last element, until an empty message."""
    torch_multiprocessing.set_sharing_strategy("file_system")
    while handle := connection.recv_bytes():
        tensor = pickle.loads(handle)  # noqa: S301 - from our own parent
        connection.send((tensor[0, 0].item(), tensor[-1, -1].item()))
        del tensor


def hand_off(connection: Connection, tensor: torch.Tensor) -> tuple[float, float]:
    """Return the seconds for making and for opening a handle; checks what the other process saw."""
    ends = (tensor[0, 0].item(), tensor[-1, -1].item())
    began = time.perf_counter()
    handle = bytes(ForkingPickler.dumps(tensor))
    made = time.perf_counter()
    connection.send_bytes(handle)
    if connection.recv() != ends:
        raise SystemExit("the other process saw other bytes")
    return made - began, time.perf_counter() - made


def measure(connection: Connection, nbytes: int, repeats: int) -> dict[str, Any]:
    """Hand off views of `ENTRIES` entries and fresh ordinary tensors of the same bytes in turn."""
    rows = nbytes // (2 * 3584)
    shape = (rows, 3584)
    manager = MultimodalEmbeddingCacheManager(ENTRIES * rows * 3584 * 2)
    leases = []
    for number in range(ENTRIES):
        reservation = manager.reserve(str(number), rows * 3584 * 2, owner="benchmark")
        reservation.view.view(torch.float16).random_(0, 100)
        leases.append(reservation.commit(dtype=torch.float16, shape=shape))
    made: dict[str, list[float]] = {way: [] for way in WAYS}
    opened: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(repeats + 1):
        lease = leases[number % ENTRIES]
        ordinary = lease.embedding.tensor.clone()
        for way, tensor in zip(WAYS, (lease.shared_tensor, ordinary), strict=True):
            making, opening = hand_off(connection, tensor)
            if number:
                made[way].append(making)
                opened[way].append(opening)
        del ordinary, tensor
    for lease in leases:
        lease.release()
    manager.close()
    rounds = {way: [sum(pair) for pair in zip(made[way], opened[way], strict=True)] for way in WAYS}
    view, ordinary_tensor = WAYS
    return {
        "bytes": rows * 3584 * 2,
        "make_ms": {way: median_ms(made[way]) for way in WAYS},
        "open_ms": {way: median_ms(opened[way]) for way in WAYS},
        "make_ratio": round(median_ratio(made[ordinary_tensor], made[view]), 1),
        "both_ratio": round(median_ratio(rounds[ordinary_tensor], rounds[view]), 1),
    }


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21, help="hand-offs of each kind and size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch_multiprocessing.set_sharing_strategy("file_system")
    ours, theirs = get_context("spawn").Pipe()
    other = get_context("spawn").Process(target=open_what_comes, args=(theirs,), daemon=True)
    other.start()
    sizes = {}
    for name, nbytes in SIZES.items():
        sizes[name] = measure(ours, nbytes, arguments.repeats)
        say(f"{name:>6}: {sizes[name]}")
    ours.send_bytes(b"")
    other.join(10)
    finish("cache_handoff", {"repeats": arguments.repeats, "sizes": sizes})


if __name__ == "__main__":
    main()
