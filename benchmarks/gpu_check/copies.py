"""GPU to arena and back by the product's own copies, beside torch's pinned memory and pageable ways."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from benchmarks.measuring import MB, interleave, median_ms
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.transformers.features import joined_on

SIZES = (1, 10, 34, 100)
ARENA_BYTES = 1024 * MB
WIDTH = 1024


def waited(work: Callable[[], object]) -> Callable[[], None]:
    """Return `work` followed by a wait for the GPU."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return run


def measure(manager: MultimodalEmbeddingCacheManager, megabytes: int) -> dict[str, object]:
    """Measure one size, all ways in turn; return medians in ms and the share of the pinned copy's speed."""
    nbytes = megabytes * MB
    on_gpu = torch.rand(nbytes // 2 // WIDTH, WIDTH, device="cuda").half()
    target = torch.empty_like(on_gpu)
    pinned = torch.empty(on_gpu.shape, dtype=on_gpu.dtype, pin_memory=True)
    pageable = torch.ones(on_gpu.shape, dtype=on_gpu.dtype)
    reservation = manager.reserve("written", nbytes, owner="gpu_check")
    other = manager.reserve("read", nbytes, owner="gpu_check")
    other.write(on_gpu)
    with other.commit(dtype=on_gpu.dtype, shape=tuple(on_gpu.shape)) as lease:
        ways = {
            "to_arena": waited(lambda: reservation.write(on_gpu, computed=True)),
            "to_pinned": waited(lambda: pinned.copy_(on_gpu, non_blocking=True)),
            "to_new_cpu_tensor": waited(lambda: on_gpu.to("cpu", copy=True)),
            "from_arena": waited(lambda: joined_on(on_gpu.device, [lease.tensor])),
            "from_pinned": waited(lambda: target.copy_(pinned, non_blocking=True)),
            "from_pageable": waited(lambda: target.copy_(pageable, non_blocking=True)),
        }
        times = {name: median_ms(seconds) for name, seconds in interleave(ways, 15).items()}
    right = bool(torch.equal(reservation.view.view(on_gpu.dtype), on_gpu.flatten().cpu()))
    reservation.abandon()
    manager.clear()
    return {
        "mb": megabytes,
        "ms": times,
        "to_arena_of_pinned": round(times["to_pinned"] / times["to_arena"], 2),
        "from_arena_of_pinned": round(times["from_pinned"] / times["from_arena"], 2),
        "right": right,
    }


def main() -> None:
    """Print one line for the arena and one for each size."""
    manager = MultimodalEmbeddingCacheManager(ARENA_BYTES)
    began = time.perf_counter()
    manager.arena.page_lock()
    locked_s = time.perf_counter() - began
    line = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "arena_mb": ARENA_BYTES // MB}
    print(
        json.dumps({**line, "page_locked": manager.arena.page_locked, "page_lock_s": round(locked_s, 3)}),
        flush=True,
    )
    for megabytes in SIZES:
        print(json.dumps(measure(manager, megabytes)), flush=True)


if __name__ == "__main__":
    main()
