"""An embedding on its way to SGLang's schedulers: a tensor that is pickled as its place in the arena.

SGLang passes a request to its scheduler pickled, and from there to those of other ranks, pickled again. A
plain tensor would be copied into a segment of shared memory for each request. This one is rebuilt in each of
those processes as a view of the same physical memory, which is mapped once a process.

SGLang only reads what a request carries, in steps that compute its prompt (`mm_schedule.py`), keeps none of
it in a cache, and lets go of it when the request ends (`Scheduler._maybe_clear_mm_inputs`, 0.5.23). So a
lease that is held to the request's end is enough. Results of operations on it are plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle, OpenArenas

_arenas = OpenArenas()


class HandedOver(torch.Tensor):
    """See above. Make it by `hand_over`; valid as long as the lease behind its handle is held."""

    handle: Handle
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """False: SGLang asks, and would copy a tensor of which it is true into memory of its own."""
        return False

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Handle], HandedOver], tuple[Handle]]:
        return rebuild, (self.handle,)


def hand_over(handle: Handle) -> HandedOver:
    """Return what stands for an embedding in a process that does not read it: its shape, and no bytes."""
    return _with_handle(torch.empty((), dtype=handle.dtype).expand(handle.shape), handle)


def rebuild(handle: Handle) -> HandedOver:
    """Return the embedding in this process. Raises `SharedMemoryError` when the arena's process is gone."""
    return _with_handle(_arenas.tensor(handle), handle)


def _with_handle(tensor: torch.Tensor, handle: Handle) -> HandedOver:
    handed = tensor.as_subclass(HandedOver)
    handed.handle = handle
    return handed
