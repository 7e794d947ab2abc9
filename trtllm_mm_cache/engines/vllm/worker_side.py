"""The connector in a worker: copies between the arena and vLLM's encoder cache."""

from __future__ import annotations

import ctypes
import logging

import torch
import xxhash

from trtllm_mm_cache.cache.arena.handle import Handle, OpenArenas
from trtllm_mm_cache.cache.arena.marks import write_mark
from trtllm_mm_cache.engines.own_tower import Fill
from trtllm_mm_cache.engines.vllm.copies import copies_for
from trtllm_mm_cache.engines.vllm.step_copies import FailedLoads, StepCopies

logger = logging.getLogger(__name__)


class WorkerSide:
    """Copies in a worker what the scheduler's side decided. Each arena is mapped once."""

    def __init__(self, device: torch.device, *, encodes: Handle | None = None) -> None:
        """`encodes` is where this worker counts what is encoded; None where it does not, nor fills."""
        self._copies = copies_for(device)
        self._arenas = OpenArenas()
        self._encodes = None if encodes is None else self._arenas.tensor(encodes)
        self._failed: set[str] = set()
        self._zeros: set[str] = set()

    def load(self, step: StepCopies, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Copy embeddings into vLLM's encoder cache. Never raises: zeros stand for what cannot be copied."""
        for identifier, handle in step.loads:
            if identifier in encoder_cache:
                continue
            try:
                encoder_cache[identifier] = self._copies.copy(self._arenas.tensor(handle))
            except Exception:
                logger.exception("an embedding could not be loaded from the arena; its requests fail")
                self._failed.add(identifier)
                self._zeros.add(identifier)
                encoder_cache[identifier] = self._copies.zeros(handle.shape, handle.dtype)

    def save(self, step: StepCopies, identifier: str, made: torch.Tensor) -> None:
        """Copy out what the tower has made, if this step has a fill for it. Never raises.

        Of several ranks, which all have the whole of it, one does so.
        """
        if self._encodes is None:
            return
        self._encodes += 1
        fill = step.fills.pop(identifier, None)
        if fill is not None:
            self._fill(fill, made)

    def keep(self, step: StepCopies, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Copy out what vLLM's encoder cache has from before, for requests that found it nowhere else."""
        for identifier, fill in step.kept.items():
            made = encoder_cache.get(identifier)
            if self._encodes is not None and made is not None and identifier not in self._zeros:
                self._fill(fill, made)

    def _fill(self, fill: Fill, made: torch.Tensor) -> None:
        try:
            target = self._arenas.tensor(fill.target)
            if target.shape != made.shape or target.dtype != made.dtype:
                logger.error("an embedding of another shape was made than its extent was reserved for")
                return
            self._copies.store(made, target)
            write_mark(self._arenas.tensor(fill.mark), fill.nonce, _checksum(target))
        except Exception:
            logger.exception("an embedding could not be copied into the arena; it is not kept")

    def wait(self) -> None:
        """Block until nothing reads the arena any more."""
        self._copies.wait()

    def take_failed(self) -> FailedLoads | None:
        """Return what could not be loaded since the last call."""
        failed, self._failed = self._failed, set()
        return FailedLoads(frozenset(failed)) if failed else None


def _checksum(tensor: torch.Tensor) -> int:
    """Return XXH3-64 over the bytes of a contiguous tensor."""
    memory = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    return xxhash.xxh3_64_intdigest(memory)
