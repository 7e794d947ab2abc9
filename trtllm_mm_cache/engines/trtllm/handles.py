"""Handles by which another process opens tensors that lie in this process's shared memory.

The layout is that of TensorRT-LLM's `SharedTensorContainer.dump_to_dict()` for a CPU tensor (read in
`tensorrt_llm/_torch/shared_tensor/shared_tensor.py`, 1.3): sizes and offsets count elements of
`storage_dtype`, the two names are base64. It is written here without that class, which would need
tensorrt_llm and a change of torch's process-wide sharing strategy for each call.

A handle of a tensor in the arena copies nothing: some microseconds, whatever the size
(`tests/engines/trtllm/test_handles.py` has the bound).

torch counts references to a shared file in its header: each process that maps it counts one, and whoever
hands a handle out counts one more, which the opening process takes off again (`rebuild_storage_filename`).
The file's name goes when the count reaches zero. So each handle adds one for each process that may open
it; were one opened more often than counted, the arena's name would go while it is still needed. A handle
that nobody opens leaves the count too high, which costs nothing: the arena's name goes with this process.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_mm_cache.cache.arena.region import create_shared_storage
from trtllm_mm_cache.engines.trtllm.mrope import MropePositions

_REBUILD_CPU = 2
_DELTA_BYTES = 64
_SMALLEST_BYTES = 64 * 1024

Handle = dict[str, Any]


def cpu_handle(tensor: torch.Tensor, *, openers: int = 1) -> Handle:
    """Return the handle of a tensor whose storage is file-system shared memory; JSON-safe.

    `openers` is the number of processes that may open it. It is true while the tensor's bytes are: the
    handle itself keeps nothing alive.
    """
    storage = tensor.untyped_storage()
    manager, name, nbytes = storage._share_filename_cpu_()
    for _ in range(openers):
        storage._shared_incref()  # type: ignore[no-untyped-call]
    return {
        "method_key": _REBUILD_CPU,
        "tensor_size": list(tensor.shape),
        "tensor_stride": list(tensor.stride()),
        "tensor_storage_offset": tensor.storage_offset(),
        "manager_handle": base64.b64encode(manager).decode(),
        "storage_handle": base64.b64encode(name).decode(),
        "storage_size": nbytes // tensor.element_size(),
        "storage_dtype": str(tensor.dtype),
    }


@dataclass(frozen=True, eq=False)
class PositionBuffer:
    """Positions of one prompt in shared memory, for one request at a time."""

    storage: torch.UntypedStorage

    def write(self, positions: MropePositions) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy positions in; return views: ids int64 `[3, 1, length]`, delta int32 `[1, 1]`."""
        source = torch.from_numpy(positions.position_ids)
        ids = torch.empty(0, dtype=torch.int64)
        ids.set_(self.storage, _DELTA_BYTES // ids.element_size(), source.shape, source.stride())
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

    def give_back(self, buffer: PositionBuffer) -> None:
        """Let the next request have it: the process that opened it must be done with it."""
        with self._guard:
            self._idle.append(buffer)

    def close(self) -> None:
        """Let the buffers go. A file whose handles were not all opened goes with this process."""
        with self._guard:
            self._idle.clear()
