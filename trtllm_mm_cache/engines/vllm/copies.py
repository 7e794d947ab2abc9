"""From the arena into a tensor of the engine's own: vLLM's encoder cache never holds a view of the arena.

vLLM keeps what its encoder cache holds long after a request has ended. A view would by then show another
image's embedding, and the next request with the old key would be answered from it, without any error.
"""

from __future__ import annotations

from typing import Protocol

import torch

from trtllm_mm_cache.cache.arena.page_lock import page_lock


class Copies(Protocol):
    """How a worker copies. `copy` may return before the bytes have arrived; `wait` returns afterwards."""

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy of `source` on the worker's device, safe to use in the current stream."""
        ...

    def store(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor of the worker's device into host memory; complete when it returns."""
        ...

    def zeros(self, source_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return what stands for an embedding that could not be copied."""
        ...

    def wait(self) -> None:
        """Block until nothing reads any `source` any more."""
        ...


class HostCopies:
    """Copies in host memory: complete when `copy` returns."""

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """See `Copies.copy`."""
        return source.clone()

    def store(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `Copies.store`."""
        target.copy_(source)

    def zeros(self, source_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Copies.zeros`."""
        return torch.zeros(source_shape, dtype=dtype)

    def wait(self) -> None:
        """See `Copies.wait`."""


class CudaCopies:
    """Copies to one GPU on a stream of their own. NOT RUN: no GPU was at hand (`tests/cuda` has its tests).

    Page-locking is per process and mapping, so the worker page-locks each arena that it maps, at its first
    copy from there: without it a copy is many times slower and not asynchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._locked: set[int] = set()

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """See `Copies.copy`. Whatever the current stream runs from here on waits for the bytes."""
        self._page_lock(source.untyped_storage())
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            target = torch.empty_like(source, device=self._device)
            target.copy_(source, non_blocking=True)
        current.wait_stream(self._stream)
        # The allocator must not give the memory away while the model's stream still reads it.
        target.record_stream(current)
        return target

    def store(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `Copies.store`: waits for the tower, then for the copy (10 MB: 0.24 ms where page-locked)."""
        self._page_lock(target.untyped_storage())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def zeros(self, source_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Copies.zeros`."""
        return torch.zeros(source_shape, dtype=dtype, device=self._device)

    def wait(self) -> None:
        """See `Copies.wait`."""
        self._stream.synchronize()

    def _page_lock(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self._locked:
            self._locked.add(address)
            page_lock(address, storage.nbytes())


def copies_for(device: torch.device) -> Copies:
    """Return how a worker on `device` copies."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()
