"""From the PD worker to SGLang's scheduler: an embedding by its place in the arena, and SGLang's own way.

    python -m benchmarks.sglang_handoff [--repeats 21]      (in SGLang's environment)

Two ways in turn, between two processes over a pipe, with SGLang's own classes and no engine:

    place   `HandedOver`: pickled as a handle, rebuilt as a view of the arena
    copy    `ShmPointerMMData`, which SGLang makes of a tensor: a segment of shared memory for each request
    hash    what SGLang adds for an item without an identity: SHA-256 over the embedding

For each size medians in milliseconds of `make` (here, up to the bytes to send), `open` (there) and `read`
(there: every byte once, into memory that is there already, as a prefill does).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.measuring import MB, finish, median_ms, say
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.sglang.handed_over import hand_over

SIZES = {"1 MB": MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
ENTRIES = 3
DTYPE = torch.bfloat16
WIDTH = 10240
"""Qwen3-VL's: a row of 2560 and three levels beside it."""


def by_place(lease: Lease) -> bytes:
    """Return what goes to the scheduler of our own."""
    return pickle.dumps(hand_over(lease.handle()))


def by_copy(lease: Lease) -> bytes:
    """Return what SGLang sends for a plain tensor."""
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    return pickle.dumps(ShmPointerMMData(lease.tensor, precomputed_hash=1))


def take(connection: Connection) -> None:
    """Open what comes and read it; answer with the seconds of both. Ends with an empty message."""
    from sglang.srt.managers.mm_utils import ShmPointerMMData

    room = torch.empty(max(SIZES.values()), dtype=torch.uint8).fill_(1)
    connection.send(None)
    while message := connection.recv_bytes():
        began = time.perf_counter()
        tensor = pickle.loads(message)  # noqa: S301 - from our own parent
        if isinstance(tensor, ShmPointerMMData):
            tensor = tensor.materialize()
        opened = time.perf_counter()
        taken = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        taken.copy_(tensor)
        read = time.perf_counter()
        connection.send((opened - began, read - opened, taken[0, 0].item(), taken[-1, -1].item()))
        del tensor


def measure(connection: Connection, nbytes: int, repeats: int) -> dict[str, Any]:
    """Hand over entries of one size by both ways in turn."""
    rows = nbytes // (DTYPE.itemsize * WIDTH)
    nbytes = rows * WIDTH * DTYPE.itemsize
    cache = MultimodalEmbeddingCacheManager(ENTRIES * nbytes)
    leases = []
    for number in range(ENTRIES):
        reservation = cache.reserve(f"{number:064x}", nbytes, owner="benchmark")
        reservation.view.view(DTYPE).random_(0, 100)
        leases.append(reservation.commit(dtype=DTYPE, shape=(rows, WIDTH)))
    ways: dict[str, Callable[[Lease], bytes]] = {"place": by_place, "copy": by_copy}
    seconds = {way: {part: [] for part in ("make", "open", "read")} for way in ways}
    for number in range(repeats + 1):
        lease = leases[number % ENTRIES]
        for way, make in ways.items():
            began = time.perf_counter()
            message = make(lease)
            made = time.perf_counter() - began
            connection.send_bytes(message)
            opened, read, first, last = connection.recv()
            if (first, last) != (lease.tensor[0, 0].item(), lease.tensor[-1, -1].item()):
                raise SystemExit("the other process saw other bytes")
            if number:
                for part, spent in zip(seconds[way], (made, opened, read), strict=True):
                    seconds[way][part].append(spent)
    hashed = [_hash_seconds(leases[number % ENTRIES]) for number in range(min(5, repeats))]
    for lease in leases:
        lease.release()
    cache.close()
    return {
        "bytes": nbytes,
        **{way: {part: median_ms(spent) for part, spent in parts.items()} for way, parts in seconds.items()},
        "hash": median_ms(hashed),
    }


def _hash_seconds(lease: Lease) -> float:
    from sglang.srt.managers.mm_utils import hash_feature

    began = time.perf_counter()
    hash_feature(lease.tensor)
    return time.perf_counter() - began


def hand_over_all(repeats: int) -> dict[str, Any]:
    """Measure every size between this process and one of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=take, args=(theirs,), daemon=True)
    other.start()
    theirs.close()
    ours.recv()
    sizes = {}
    try:
        for name, nbytes in SIZES.items():
            sizes[name] = measure(ours, nbytes, repeats)
            say(f"{name:>6}: {sizes[name]}")
    finally:
        with contextlib.suppress(OSError):
            ours.send_bytes(b"")
        other.join(10)
    return sizes


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21, help="hand-overs of each way and size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    finish("sglang_handoff", {"repeats": arguments.repeats, "sizes": hand_over_all(arguments.repeats)})


if __name__ == "__main__":
    main()
