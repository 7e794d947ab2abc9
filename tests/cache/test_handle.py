"""How another process opens a lease, and how torch's count of openers stays within its 32 bits."""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from trtllm_mm_cache.cache.arena.handle import MOST_OPENERS, OpenArenas
from trtllm_mm_cache.cache.arena.region import HEADER_BYTES
from trtllm_mm_cache.cache.manager import CachedEmbedding, Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.errors import IntegrityError

TORCH_ALONE = """
import pickle, sys, torch
from torch.multiprocessing.reductions import rebuild_storage_filename
handle = pickle.loads(bytes.fromhex(sys.stdin.read()))
storage = rebuild_storage_filename(
    torch.UntypedStorage, handle.manager, handle.file, handle.storage_bytes
)
raw = torch.empty(0, dtype=torch.uint8).set_(storage, handle.offset, (handle.nbytes,), (1,))
print(raw.view(handle.dtype).view(handle.shape).sum().item())
del raw, storage  # unmaps it, which the end of a process need not do
"""

OURS = """
import pickle, sys
from trtllm_mm_cache.cache.arena.handle import OpenArenas
handle = pickle.loads(bytes.fromhex(sys.stdin.read()))
print(OpenArenas().tensor(handle).sum().item())
"""


@pytest.fixture
def lease() -> Iterator[Lease]:
    manager = MultimodalEmbeddingCacheManager(4 * 1024 * 1024)
    manager.set("before", CachedEmbedding(torch.zeros(1000)))
    manager.set("a", CachedEmbedding(torch.full((16, 32), 0.5, dtype=torch.bfloat16)))
    found = manager.lease("a")
    assert found is not None
    yield found
    found.release()


def count_of(lease: Lease) -> ctypes.c_int32:
    """The count in the header of the arena's file."""
    handle = lease.handle()
    return ctypes.c_int32.from_address(lease.address - handle.offset - HEADER_BYTES)


def open_elsewhere(program: str, lease: Lease, *, openers: int) -> float:
    sent = pickle.dumps(lease.handle(openers=openers)).hex()
    result = subprocess.run(
        [sys.executable, "-c", program], input=sent, capture_output=True, text=True, timeout=60, check=True
    )
    return float(result.stdout)


@pytest.mark.parametrize(("program", "openers"), [(OURS, 0), (TORCH_ALONE, 1)], ids=["ours", "torch alone"])
def test_another_process_opens_a_lease_and_leaves_the_count_as_it_was(
    lease: Lease, program: str, openers: int
) -> None:
    before = count_of(lease).value
    assert open_elsewhere(program, lease, openers=openers) == 256.0
    assert count_of(lease).value == before
    assert open_elsewhere(program, lease, openers=openers) == 256.0, "the file lost its name"


def test_a_handle_is_the_place_of_the_lease_and_only_while_it_is_held(lease: Lease) -> None:
    handle = lease.handle()
    assert (handle.offset, handle.nbytes, handle.dtype, handle.shape) == (
        lease.offset,
        lease.nbytes,
        torch.bfloat16,
        (16, 32),
    )
    arenas = OpenArenas()
    assert arenas.tensor(handle).equal(lease.tensor)
    assert arenas.tensor(handle).data_ptr() == arenas.tensor(handle).data_ptr() != lease.address
    lease.release()
    with pytest.raises(IntegrityError, match="released"):
        lease.handle()


def test_openers_that_never_open_do_not_make_the_count_overflow(lease: Lease) -> None:
    count = count_of(lease)
    before = count.value
    lease.handle(openers=3)
    assert count.value == before + 3
    count.value = MOST_OPENERS - 1
    for _ in range(3):
        lease.handle(openers=2)
    assert count.value == MOST_OPENERS
    assert open_elsewhere(TORCH_ALONE, lease, openers=1) == 256.0
    assert MOST_OPENERS - 1 <= count.value <= MOST_OPENERS
    assert open_elsewhere(TORCH_ALONE, lease, openers=1) == 256.0, "the file lost its name"
    count.value = before
