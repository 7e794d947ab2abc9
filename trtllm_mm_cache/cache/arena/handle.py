"""How another process opens bytes of an arena: the one form for every engine.

A handle costs microseconds and copies nothing, whatever the size: torch's name of the shared storage, and
where in it the embedding lies. It keeps nothing alive: it is valid while the lease that it was made from is
held.

torch counts references to a shared file in the file's header: each process that maps it counts one, and
whoever passes a handle on counts one more for each process that opens it by torch's own
`rebuild_storage_filename`, which takes it off again. The file's name goes when the count reaches zero, so a
handle that is opened more often than counted would take the name away from those that come later.
`OpenArenas` maps each arena once and takes nothing off.

An opener that was counted and never opens leaves the count one higher for ever, and the count is an `int32`.
So handles raise it no further than `MOST_OPENERS`; there each that opens still takes one off, and the next
handle puts it on again.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from trtllm_mm_cache.cache.arena.region import HEADER_BYTES, open_shared_storage

MOST_OPENERS = 2**30
"""Half of what torch's count can hold: the rest is for those that count at the same time."""


@dataclass(frozen=True, slots=True)
class Handle:
    """`shape` of `dtype`, contiguous, from `offset` bytes after the start of a shared storage.

    `manager` and `file` are what torch calls the storage, `storage_bytes` is its size. Picklable.
    """

    manager: bytes
    file: bytes
    storage_bytes: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, *, openers: int = 0) -> Handle:
        """Return the handle of a contiguous tensor whose storage is file-system shared memory.

        `openers` processes will open it by torch's own means (see above).
        """
        storage = tensor.untyped_storage()
        manager, file, nbytes = storage._share_filename_cpu_()
        count = ctypes.c_int32.from_address(storage.data_ptr() - HEADER_BYTES)
        for _ in range(min(openers, MOST_OPENERS - count.value)):
            storage._shared_incref()  # type: ignore[no-untyped-call]
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return cls(manager, file, nbytes, offset, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Size of the embedding in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class OpenArenas:
    """Another process's mappings of the arenas that handles lead to: each opened once, and kept."""

    def __init__(self) -> None:
        self._storages: dict[bytes, torch.UntypedStorage] = {}

    def tensor(self, handle: Handle) -> torch.Tensor:
        """Return the embedding, in the same physical memory. Do not write to it.

        Valid as long as the handle is. Raises `SharedMemoryError` when the arena's process is gone.
        """
        storage = self._storages.get(handle.file)
        if storage is None:
            storage = open_shared_storage(handle.manager, handle.file, handle.storage_bytes)
            self._storages[handle.file] = storage
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, handle.offset, (handle.nbytes,), (1,))
        return raw.view(handle.dtype).view(handle.shape)
