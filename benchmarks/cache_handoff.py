"""Handing a cached embedding to another process, beside the first hand-off of an ordinary tensor.

    python -m benchmarks.cache_handoff [--repeats 21]

Three ways in turn:

    arena handle     `Lease.handle`: what every engine in another process is given, opened by torch alone
    arena view       a view of the arena by torch's own reduction with the file-system strategy, pickled
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
import contextlib
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
from trtllm_mm_cache.cache.arena.handle import OpenArenas
from trtllm_mm_cache.cache.arena.region import patiently
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager

SIZES = {"1 MB": MB, "4 MB": 4 * MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
ENTRIES = 4
DTYPE = torch.float16
WIDTH = 3584


def _by_handle(lease: Lease, _: torch.Tensor) -> bytes:
    return pickle.dumps(lease.handle(openers=1))


def _by_reduction(lease: Lease, _: torch.Tensor) -> bytes:
    return bytes(ForkingPickler.dumps(view_of(lease)))


def _ordinary(_: Lease, tensor: torch.Tensor) -> bytes:
    return bytes(patiently(lambda: ForkingPickler.dumps(tensor)))


def view_of(lease: Lease) -> torch.Tensor:
    """Return a tensor on the arena's shared storage itself, which torch's reduction does not copy."""
    return ARENAS.tensor(lease.handle())


ARENAS = OpenArenas()

WAYS: dict[str, Callable[[Lease, torch.Tensor], bytes]] = {
    "arena handle": _by_handle,
    "arena view": _by_reduction,
    "ordinary tensor": _ordinary,
}


def open_what_comes(connection: Connection) -> None:
    """Open every handle, answer with its first and last element, until an empty message."""
    torch_multiprocessing.set_sharing_strategy("file_system")
    while handle := connection.recv_bytes():
        # torch's shared-memory helper may be too busy to answer within the second that it is given.
        tensor = patiently(lambda handle=handle: open_message(handle))
        connection.send((tensor[0, 0].item(), tensor[-1, -1].item()))
        del tensor


def open_message(message: bytes) -> torch.Tensor:
    """Open what one of `WAYS` made, a `Handle` with torch alone as an engine's own code does."""
    handle = pickle.loads(message)  # noqa: S301 - from our own parent
    if isinstance(handle, torch.Tensor):
        return handle
    storage = rebuild_storage_filename(
        torch.UntypedStorage, handle.manager, handle.file, handle.storage_bytes
    )
    raw = torch.empty(0, dtype=torch.uint8).set_(storage, handle.offset, (handle.nbytes,), (1,))
    return raw.view(handle.dtype).view(handle.shape)


class OtherProcess:
    """The process that opens; a context manager. Its death is an error here, at once."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=open_what_comes, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # kept open here, the pipe would not end with the other process

    def open(self, handle: bytes) -> tuple[float, float]:
        """Have `handle` opened; return the first and last element that the other process saw."""
        try:
            self._connection.send_bytes(handle)
            first, last = self._connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise SystemExit(f"the other process ended with {self.process.exitcode}") from None
        return first, last

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send_bytes(b"")
        self.process.join(10)
        self._connection.close()


def hand_off(
    other: OtherProcess, make: Callable[[], bytes], ends: tuple[float, float]
) -> tuple[float, float]:
    """Return the seconds for making and for opening; checks that the other process saw `ends`."""
    began = time.perf_counter()
    handle = make()
    made = time.perf_counter()
    if other.open(handle) != ends:
        raise SystemExit("the other process saw other bytes")
    return made - began, time.perf_counter() - made


def measure(other: OtherProcess, nbytes: int, repeats: int) -> dict[str, Any]:
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
        ordinary = lease.tensor.clone()
        ends = (ordinary[0, 0].item(), ordinary[-1, -1].item())
        for way, make in WAYS.items():
            making, opening = hand_off(other, partial(make, lease, ordinary), ends)
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
    sizes = {}
    with OtherProcess() as other:
        for name, nbytes in SIZES.items():
            sizes[name] = measure(other, nbytes, arguments.repeats)
            say(f"{name:>6}: {sizes[name]}")
    finish("cache_handoff", {"repeats": arguments.repeats, "sizes": sizes})


if __name__ == "__main__":
    main()
