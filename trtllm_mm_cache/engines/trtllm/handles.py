"""Handles in TensorRT-LLM's form, and shared memory for the positions that it takes by handle.

The form is that of TensorRT-LLM's `SharedTensorContainer.dump_to_dict()` for a CPU tensor (read in
`tensorrt_llm/_torch/shared_tensor/shared_tensor.py`, 1.3): sizes and offsets count elements of
`storage_dtype`, the two names are base64. It is written here without that class, which would need
tensorrt_llm and a change of torch's process-wide sharing strategy for each call.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.arena.region import create_shared_storage
from trtllm_mm_cache.engines.trtllm.mrope import MropePositions

_REBUILD_CPU = 2
_DELTA_BYTES = 64
_SMALLEST_BYTES = 64 * 1024


def cpu_handle(handle: Handle) -> dict[str, Any]:
    """Return `handle` as TensorRT-LLM takes it; JSON-safe.

    Each engine process opens it by torch's own means: make the handle with as many `openers`.
    """
    itemsize = handle.dtype.itemsize
    return {
        "method_key": _REBUILD_CPU,
        "tensor_size": list(handle.shape),
        "tensor_stride": list(torch.empty(handle.shape, device="meta").stride()),
        "tensor_storage_offset": handle.offset // itemsize,
        "manager_handle": base64.b64encode(handle.manager).decode(),
        "storage_handle": base64.b64encode(handle.file).decode(),
        "storage_size": handle.storage_bytes // itemsize,
        "storage_dtype": str(handle.dtype),
    }


@dataclass(frozen=True, eq=False)
class PositionBuffer:
    """Positions of one prompt in shared memory, for one request at a time."""

    storage: torch.UntypedStorage

    def write(self, positions: MropePositions) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy positions in; return views, contiguous: ids int64 `[3, 1, length]`, delta int32 `[1, 1]`."""
        source = torch.from_numpy(positions.position_ids)
        ids = torch.empty(0, dtype=torch.int64)
        strides = (source.shape[2], source.shape[2], 1)
        ids.set_(self.storage, _DELTA_BYTES // ids.element_size(), source.shape, strides)
        delta = torch.empty(0, dtype=torch.int32).set_(self.storage, 0, (1, 1), (1, 1))
        ids.copy_(source)
        delta.fill_(positions.delta)
        return ids, delta


class PositionBufferPool:
    """Shared buffers for positions, used again: a fresh shared file costs 0.6 ms, one from here nothing.

    There are as many as requests were under way at once. Thread-safe.
    """

    def __init__(self) -> None:
        self._idle: list[PositionBuffer] = []
        self._guard = threading.Lock()

    def take(self, positions: MropePositions) -> PositionBuffer:
        """Return a buffer that is large enough for `positions`. Raises `SharedMemoryError`."""
        needed = _DELTA_BYTES + positions.position_ids.nbytes
        with self._guard:
            for index, buffer in enumerate(self._idle):
                if buffer.storage.nbytes() >= needed:
                    return self._idle.pop(index)
        return PositionBuffer(create_shared_storage(max(_SMALLEST_BYTES, 1 << (needed - 1).bit_length())))

    def release(self, buffer: PositionBuffer) -> None:
        """Take a buffer for later requests: the process that opened it must be done with it."""
        with self._guard:
            self._idle.append(buffer)

    def close(self) -> None:
        """Free the buffers. A file whose handles were not all opened goes with this process."""
        with self._guard:
            self._idle.clear()
