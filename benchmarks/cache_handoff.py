"""Handing a cached embedding to another process, beside the first hand-off of an ordinary tensor.

    python -m benchmarks.cache_handoff [--repeats 21]

Three ways in turn:

    arena handle     `cpu_handle` of a view of the arena: what the TensorRT-LLM engine is given
    arena view       the same view by torch's own reduction with the file-system strategy, as it is pickled
    ordinary tensor  a fresh tensor by that reduction, which is what an engine does with a CPU tensor: torch
                     makes a shared file and copies the tensor into it

For each size medians in milliseconds of

    make   hit to bytes that another process understands, from the lease or the tensor on
    open   those bytes to a tensor in the other process, its first and last element read, and the answer
           back over a pipe

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import pickle
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing as torch_multiprocessing
from torch.multiprocessing.reductions import rebuild_storage_filename

from benchmarks.measuring import MB, finish, median_ms, median_ratio, say
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.trtllm.handles import cpu_handle

SIZES = {"1 MB": MB, "4 MB": 4 * MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
ENTRIES = 4
DTYPE = torch.float16
WIDTH = 3584


def _by_handle(lease: Lease, _: torch.Tensor) -> bytes:
    return pickle.dumps(cpu_handle(lease.shared_tensor))


def _by_reduction(lease: Lease, _: torch.Tensor) -> bytes:
    return bytes(ForkingPickler.dumps(lease.shared_tensor))


def _ordinary(_: Lease, tensor: torch.Tensor) -> bytes:
    return bytes(ForkingPickler.dumps(tensor))


WAYS: dict[str, Callable[[Lease, torch.Tensor], bytes]] = {
    "arena handle": _by_handle,
    "arena view": _by_reduction,
    "ordinary tensor": _ordinary,
}


def open_what_comes(connection: Connection) -> None:
    """Open every handle, answer with its first and last element, until an empty message."""
    torch_multiprocessing.set_sharing_strategy("file_system")
    while handle := connection.recv_bytes():
        message = pickle.loads(handle)  # noqa: S301 - from our own parent
        tensor = message if isinstance(message, torch.Tensor) else open_handle(message)
        connection.send((tensor[0, 0].item(), tensor[-1, -1].item()))
        del tensor, message


def open_handle(handle: dict[str, Any]) -> torch.Tensor:
    """Open a `cpu_handle` with torch alone, as TensorRT-LLM's `SharedTensorContainer` does."""
    storage = rebuild_storage_filename(
        torch.UntypedStorage,
        base64.b64decode(handle["manager_handle"]),
        base64.b64decode(handle["storage_handle"]),
        handle["storage_size"] * DTYPE.itemsize,
    )
    shape, stride = handle["tensor_size"], handle["tensor_stride"]
    return torch.empty(0, dtype=DTYPE).set_(storage, handle["tensor_storage_offset"], shape, stride)


def hand_off(
    connection: Connection, make: Callable[[], bytes], ends: tuple[float, float]
) -> tuple[float, float]:
    """Return the seconds for making and for opening; checks that the other process saw `ends`."""
    began = time.perf_counter()
    handle = make()
    made = time.perf_counter()
    connection.send_bytes(handle)
    if connection.recv() != ends:
        raise SystemExit("the other process saw other bytes")
    return made - began, time.perf_counter() - made


def measure(connection: Connection, nbytes: int, repeats: int) -> dict[str, Any]:
    """Hand off views of `ENTRIES` entries and fresh ordinary tensors of the same bytes in turn."""
    rows = nbytes // (DTYPE.itemsize * WIDTH)
    nbytes = rows * WIDTH * DTYPE.itemsize
    manager = MultimodalEmbeddingCacheManager(ENTRIES * nbytes)
    leases = []
    for number in range(ENTRIES):
        reservation = manager.reserve(str(number), nbytes, owner="benchmark")
        reservation.view.view(DTYPE).random_(0, 100)
        leases.append(reservation.commit(dtype=DTYPE, shape=(rows, WIDTH)))
    made: dict[str, list[float]] = {way: [] for way in WAYS}
    opened: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(repeats + 1):
        lease = leases[number % ENTRIES]
        ordinary = lease.embedding.tensor.clone()
        ends = (ordinary[0, 0].item(), ordinary[-1, -1].item())
        for way, make in WAYS.items():
            making, opening = hand_off(connection, partial(make, lease, ordinary), ends)
            if number:
                made[way].append(making)
                opened[way].append(opening)
        del ordinary
    for lease in leases:
        lease.release()
    manager.close()
    both = {way: [sum(pair) for pair in zip(made[way], opened[way], strict=True)] for way in WAYS}
    ours, theirs = "arena handle", "ordinary tensor"
    return {
        "bytes": nbytes,
        "make_ms": {way: median_ms(made[way]) for way in WAYS},
        "open_ms": {way: median_ms(opened[way]) for way in WAYS},
        "make_ratio": round(median_ratio(made[theirs], made[ours]), 1),
        "both_ratio": round(median_ratio(both[theirs], both[ours]), 1),
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
