"""Handles into the arena: the engine's layout, no copy, openable any number of times, nothing left over."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from tests.engines.conftest import stored
from tests.engines.trtllm.conftest import PEER
from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem
from trtllm_mm_cache.engines.trtllm.handles import PositionBufferPool, cpu_handle
from trtllm_mm_cache.engines.trtllm.mrope import MropePositions

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where torch keeps its files

# Opens each handle on its standard input, a JSON line, and says what is in it.
OPENER = """
import json, sys, warnings
from blake3 import blake3
import torch
from tensorrt_llm._torch.shared_tensor import SharedTensorContainer
for line in sys.stdin:
    tensor = SharedTensorContainer.from_dict(json.loads(line)).get_local_view()
    data = tensor.contiguous().view(torch.uint8).numpy()
    found = (tensor.dtype, list(tensor.shape), blake3(data).hexdigest())
    del tensor, data
    print(*found, flush=True)
"""


@pytest.fixture
def cache() -> Iterator[MultimodalEmbeddingCacheManager]:
    manager = MultimodalEmbeddingCacheManager(96 << 20)
    yield manager
    manager.close()


def held(cache: MultimodalEmbeddingCacheManager, key: str, tensor: torch.Tensor) -> Lease:
    return stored(cache, key, EncodedItem(tensor, EmbeddingMetadata()))


def handle_of(lease: Lease, *, openers: int = 1) -> dict[str, Any]:
    return cpu_handle(lease.handle(openers=openers))


Open = Callable[..., list[str]]


@pytest.fixture(scope="module")
def opened() -> Iterator[Open]:
    """Open handles one after the other in one other process, as TensorRT-LLM's class does."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PEER), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with subprocess.Popen(
        [sys.executable, "-c", OPENER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, answers = process.stdin, process.stdout

        def open_all(*handles: dict[str, Any]) -> list[str]:
            found = []
            for handle in handles:
                to.write(json.dumps(handle) + "\n")
                found.append(answers.readline().strip())
            return found

        yield open_all


def content(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {blake3(data).hexdigest()}"


def references(lease: Lease) -> int:
    """The count that torch keeps in front of a shared storage's bytes."""
    return ctypes.c_int.from_address(lease.address - lease.offset - 64).value


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_layout_is_what_torchs_own_reductions_give(
    cache: MultimodalEmbeddingCacheManager, peer: Any
) -> None:
    from tensorrt_llm._torch.shared_tensor import SharedTensorContainer

    held(cache, "before", torch.zeros(7, 3))
    for dtype in (torch.bfloat16, torch.float32):
        lease = held(cache, str(dtype), torch.randn(5, 8).to(dtype))
        assert lease.offset > 0
        start = lease.offset // dtype.itemsize
        shared = torch.empty(0, dtype=dtype).set_(cache.arena.storage, start, lease.shape)
        theirs = SharedTensorContainer.from_tensor(shared).dump_to_dict()
        assert handle_of(lease) == theirs
        assert json.loads(json.dumps(theirs)) == theirs
        lease.release()


def test_another_process_opens_the_same_bytes_any_number_of_times(
    cache: MultimodalEmbeddingCacheManager, opened: Open
) -> None:
    first = held(cache, "first", torch.randn(11, 16).to(torch.bfloat16))
    second = held(cache, "second", torch.randn(3, 48))
    order = [first, second, first, first, second]
    handles = [handle_of(lease) for lease in order]
    before = references(first)
    expected = [content(lease.tensor) for lease in order]
    assert opened(*handles) == expected
    assert references(first) == before - len(handles), "each opening takes one off"
    assert references(first) >= 1, "this process's own must stay, or the name goes"
    assert opened(handle_of(first)) == expected[:1], "the name is still there"
    for lease in (first, second):
        lease.release()


def test_each_process_that_may_open_a_handle_is_counted(
    cache: MultimodalEmbeddingCacheManager, opened: Open
) -> None:
    lease = held(cache, "key", torch.randn(4, 4))
    before = references(lease)
    handle = handle_of(lease, openers=3)
    assert references(lease) == before + 3
    for _ in range(3):
        assert opened(handle) == [content(lease.tensor)]
    assert references(lease) == before
    lease.release()


def test_a_handle_costs_the_same_at_every_size(cache: MultimodalEmbeddingCacheManager) -> None:
    """No byte is copied: 34 MB cost what 64 KB cost, and both less than touching one page of each would."""

    def cost(lease: Lease) -> float:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            handle_of(lease)
            times.append(time.perf_counter() - started)
        return min(times)

    small = held(cache, "small", torch.zeros(64, 512, dtype=torch.bfloat16))
    large = held(cache, "large", torch.zeros(4096, 4160, dtype=torch.bfloat16))
    small_s, large_s = cost(small), cost(large)
    print(
        f"a handle: {small_s * 1e6:.1f} us at {small.nbytes} bytes, {large_s * 1e6:.1f} us at {large.nbytes}"
    )
    assert large_s < 500e-6
    assert large_s < 5 * small_s
    for lease in (small, large):
        lease.release()


def test_a_process_that_ends_leaves_no_file_though_its_handles_were_not_opened() -> None:
    code = (
        "import torch\n"
        "from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager\n"
        "from trtllm_mm_cache.engines.trtllm.handles import cpu_handle\n"
        "cache = MultimodalEmbeddingCacheManager(1 << 20)\n"
        "cache.set('key', CachedEmbedding(torch.zeros(4, 4)))\n"
        "for _ in range(10): cpu_handle(cache.lease('key').handle(openers=1))\n"
        "print(cache.arena.storage._share_filename_cpu_()[1].decode())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    file = SHARED_MEMORY / ended.stdout.strip().lstrip("/")
    deadline = time.monotonic() + 10
    while file.exists():
        assert time.monotonic() < deadline, "the arena's file outlived its process"
        time.sleep(0.01)


def positions(length: int, start: int = 0) -> MropePositions:
    ids = np.broadcast_to(np.arange(start, start + length), (3, 1, length)).copy()
    return MropePositions(ids, -length)


def test_positions_arrive_and_their_buffers_are_used_again(opened: Open) -> None:
    pool = PositionBufferPool()
    names = set()
    for start in range(3):
        buffer = pool.take(positions(100, start))
        ids, delta = buffer.write(positions(100, start))
        handles = [cpu_handle(Handle.of(tensor, openers=1)) for tensor in (ids, delta)]
        names |= {handle["storage_handle"] for handle in handles}
        assert opened(*handles) == [content(ids), content(delta)]
        assert (ids.dtype, ids.shape, ids[0, 0, 0].item()) == (torch.int64, (3, 1, 100), start)
        assert (delta.dtype, delta.tolist()) == (torch.int32, [[-100]])
        pool.release(buffer)
    assert len(names) == 1, "one request at a time needs one buffer"
    together = [pool.take(positions(50)) for _ in range(2)]
    assert together[0].storage.data_ptr() != together[1].storage.data_ptr()
    long = pool.take(positions(100_000))
    assert long.write(positions(100_000))[0].shape == (3, 1, 100_000)
    (file,) = [SHARED_MEMORY / base64.b64decode(name).decode().lstrip("/") for name in names]
    assert file.exists()
    pool.close()
    del ids, delta, buffer, together
    assert not file.exists(), "every handle was opened, so nothing is left"
