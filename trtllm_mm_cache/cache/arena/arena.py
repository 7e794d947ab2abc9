"""The arena: one shared, committed, prefaulted region and the extents in it.

An entry of the cache is a view into this region, so handing it to another process is a matter of a name
and an offset, and NIXL registers the region once. The arena decides nothing: it grants extents where a
hole is, and frees them.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from trtllm_mm_cache.cache.arena.extents import ALIGNMENT, Extent, ExtentMap, ExtentStatistics, aligned
from trtllm_mm_cache.cache.arena.page_lock import page_lock, page_unlock
from trtllm_mm_cache.cache.arena.place import ArenaPlace
from trtllm_mm_cache.cache.arena.region import create_shared_storage
from trtllm_mm_cache.errors import IntegrityError

# Called through CDLL, it runs without the GIL.
_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = ctypes.c_void_p

__all__ = ["ALIGNMENT", "Arena", "Extent", "ExtentStatistics"]


class Arena:
    """`capacity_bytes` bytes of file-system shared memory, cut into extents that start at multiples of 64.

    The capacity is rounded up to a multiple of 64 (at least 64). All of it is committed when the
    constructor returns; `prefault=False` leaves the mapping of the pages to their first use.

    Not thread-safe: its owner (the cache manager) holds a lock. Raises `SharedMemoryError` when the
    shared-memory file system cannot hold the capacity.
    """

    def __init__(self, capacity_bytes: int, *, prefault: bool = True) -> None:
        self._capacity = aligned(max(capacity_bytes, ALIGNMENT))
        self._storage: torch.UntypedStorage | None = create_shared_storage(self._capacity, prefault=prefault)
        self._base_address = self._storage.data_ptr()
        self._place = ArenaPlace.of(self._storage)
        whole = torch.empty(0, dtype=torch.uint8).set_(self._storage).numpy()
        self._array: npt.NDArray[np.uint8] | None = whole
        self._buffer: memoryview | None = whole.data
        self._map = ExtentMap(self._capacity)
        self._page_locked = False

    @property
    def capacity_bytes(self) -> int:
        """Size of the region: what to register, from `base_address`."""
        return self._capacity

    @property
    def base_address(self) -> int:
        """Address of the first byte in this process, a multiple of 64; constant until `close`."""
        return self._base_address

    @property
    def place(self) -> ArenaPlace:
        """Where another process of this machine and user finds the region, to map it."""
        return self._place

    @property
    def page_locked(self) -> bool:
        """Whether CUDA has the region registered."""
        return self._page_locked

    def page_lock(self) -> None:
        """Page-lock the region, in a process that copies between it and a GPU; nothing without CUDA.

        Blocking: seconds for large arenas. Idempotent.
        """
        if not self._page_locked:
            self._page_locked = page_lock(self._base_address, self._capacity)

    @property
    def storage(self) -> torch.UntypedStorage:
        """The shared storage. Tensors set on it can be handed to other processes without a copy."""
        if self._storage is None:
            raise _closed()
        return self._storage

    @property
    def extents(self) -> ExtentMap:
        """The bookkeeping, for its neighbour look-ups."""
        return self._map

    def allocate(self, nbytes: int) -> Extent | None:
        """Take an extent of `nbytes` bytes, or return None when no hole is large enough. O(log n)."""
        if self._storage is None:
            raise _closed()
        return self._map.allocate(nbytes)

    def free(self, extent: Extent) -> None:
        """Free an extent. O(log n). Raises `IntegrityError` when it is not allocated."""
        self._map.free(extent)

    def bytes_view(self, extent: Extent) -> torch.Tensor:
        """Return the extent as a uint8 tensor `[nbytes]` on the shared storage, writable, not tracked.

        Valid only while the extent is allocated, which the caller sees to.
        """
        view = torch.empty(0, dtype=torch.uint8)
        return view.set_(self.storage, extent.offset, (extent.nbytes,), (1,))

    def buffer(self, extent: Extent) -> memoryview:
        """Return the extent as a new memoryview of `nbytes` bytes, writable, not tracked."""
        if self._buffer is None:
            raise _closed()
        return self._buffer[extent.offset : extent.offset + extent.nbytes]

    def write(self, extent: Extent, tensor: torch.Tensor, *, computed: bool = False) -> None:
        """Copy the bytes of a contiguous tensor of the extent's size into it. Releases the GIL.

        A GPU's tensor goes by one copy on a stream of its own; page-locked, at the bus's speed. It waits for
        what the caller's stream computes, unless the tensor is `computed` already.

        Host memory goes by one thread's `memcpy`. torch's own copy splits anything larger than a few pages
        over its threads, which meet at a barrier: with the cores busy by other processes a copy of up to
        1 MB took 8 ms in the mean instead of 0.1.
        """
        if self._array is None:
            raise _closed()
        if extent.nbytes == 0:
            return
        source = tensor.resolve_conj().resolve_neg().contiguous()
        if source.numel() * source.element_size() != extent.nbytes:
            raise IntegrityError(f"{list(source.shape)} of {source.dtype} for {extent.nbytes} bytes")
        if source.device.type == "cpu":
            _memmove(self._base_address + extent.offset, source.data_ptr(), extent.nbytes)
        else:
            target = torch.from_numpy(self._array[extent.offset : extent.offset + extent.nbytes])
            _copy_from_device(target, source.detach().reshape(-1).view(torch.uint8), computed=computed)

    def copy(self, source: Extent, target: Extent) -> None:
        """Copy the bytes of one extent to another of the same size. Releases the GIL."""
        if self._array is None:
            raise _closed()
        array, nbytes = self._array, source.nbytes
        array[target.offset : target.offset + nbytes] = array[source.offset : source.offset + nbytes]

    def statistics(self) -> ExtentStatistics:
        """Return a snapshot of what is taken and how the free bytes lie."""
        return self._map.statistics()

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless extents and holes tile the region exactly. O(n)."""
        self._map.check_integrity()

    def close(self) -> None:
        """Release the region. Idempotent. The file goes when no view and no other process has it."""
        if self._storage is None:
            return
        if self._page_locked:
            page_unlock(self._base_address)
            self._page_locked = False
        self._array = None
        self._buffer = None
        self._storage = None


def _copy_from_device(target: torch.Tensor, source: torch.Tensor, *, computed: bool) -> None:
    stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
    if not computed:
        stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    stream.synchronize()


def _closed() -> IntegrityError:
    return IntegrityError("the arena is closed")
