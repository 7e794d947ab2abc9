"""Copying an embedding into the arena, beside memcpy and beside `clone()`.

    python -m benchmarks.cache_copy [--repeats 41]

In turn over rotating extents, for each size, medians in GB/s (1024**3 bytes a second):

    write    Reservation.write: what the encode worker does with the tower's output
    memcpy   libc's memmove of the same bytes to another extent of the same prefaulted region
    clone    an ordinary tensor of its own: memory from the allocator, its pages touched for the first time

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import MB, finish, interleave, median_ratio, say
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager

SIZES = {"1 MB": MB, "10 MB": 10 * MB, "34 MB": 34 * MB}
EXTENTS = 6
_M_MMAP_THRESHOLD = -3


def measure(nbytes: int, repeats: int) -> dict[str, Any]:
    """Copy one ordinary tensor of `nbytes` in all three ways."""
    manager = MultimodalEmbeddingCacheManager(2 * EXTENTS * nbytes)
    source = torch.empty(nbytes, dtype=torch.uint8).random_()
    extents = [manager.reserve(str(number), nbytes, owner="benchmark") for number in range(2 * EXTENTS)]
    ours, plain = itertools.cycle(extents[:EXTENTS]), itertools.cycle(extents[EXTENTS:])
    ways: dict[str, Callable[[], object]] = {
        "write": lambda: next(ours).write(source),
        "memcpy": lambda: ctypes.memmove(next(plain).address, source.data_ptr(), nbytes),
        "clone": source.clone,
    }
    spent = interleave(ways, repeats)
    for extent in extents:
        extent.abandon()
    manager.close()
    gb_s = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in spent.items()}
    return {
        "gb_per_s": {name: round(nbytes / seconds / 1024**3, 2) for name, seconds in gb_s.items()},
        "write_to_memcpy": round(median_ratio(spent["memcpy"], spent["write"]), 3),
        "write_to_clone": round(median_ratio(spent["clone"], spent["write"]), 2),
    }


def main() -> None:
    """Parse the command line and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=41, help="rounds for each size")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    # glibc would give `clone` the pages that the clone before it has just touched. A cache keeps them.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    sizes = {}
    for name, nbytes in SIZES.items():
        sizes[name] = measure(nbytes, repeats)
        say(f"{name:>6}: {sizes[name]}")
    finish("cache_copy", {"repeats": repeats, "sizes": sizes})


if __name__ == "__main__":
    main()
