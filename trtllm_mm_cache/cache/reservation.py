"""A reservation: an extent that is being written and that no look-up finds yet."""

from __future__ import annotations

import math

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import NO_METADATA, EmbeddingMetadata, Entry, EntryState
from trtllm_mm_cache.cache.lease import Lease
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.errors import EmbeddingMismatchError


class Reservation:
    """Room for one entry. Ends by exactly one of `commit`, `abandon`, or `quarantine` then `settle`.

    Quarantine is for a write that may still arrive: the extent is kept out of use until the caller
    knows that it cannot arrive any more and calls `settle`. Time alone never frees it, nor does garbage
    collection. A reservation that is garbage-collected while open is logged with its owner and freed.

    Methods are thread-safe; each raises `IntegrityError` when the reservation is past that step.
    """

    __slots__ = ("__weakref__", "_entry", "_hold", "_ledger")

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self._ledger = ledger
        self._entry = entry
        self._hold = ledger.hold(self, entry, by_reservation=True)

    @property
    def key(self) -> str:
        """The key under which `commit` will file the entry."""
        return self._entry.key

    @property
    def owner(self) -> str:
        """Who asked for it."""
        return self._entry.owner

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._entry.extent.nbytes

    @property
    def offset(self) -> int:
        """Where the extent starts, in bytes after the start of the arena."""
        return self._entry.extent.offset

    @property
    def address(self) -> int:
        """Where the extent starts in this process's memory: the target of the READ."""
        return self._ledger.arena.base_address + self._entry.extent.offset

    @property
    def state(self) -> EntryState:
        """Where the extent stands."""
        return self._entry.state

    @property
    def view(self) -> torch.Tensor:
        """The extent as a writable uint8 tensor `[nbytes]`. Write to it only before `commit`.

        The extent is not used again while the tensor or an alias of it is alive.
        """
        with self._ledger.guard:
            return self._ledger.hand_out_bytes(self._entry)

    def handle(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Handle:
        """Return how another process opens the extent, to write to it; before `commit` only.

        Copies nothing. Raises `EmbeddingMismatchError` when dtype and shape do not come to `nbytes`.
        """
        self._check_size(dtype, shape)
        view = self._ledger.arena.bytes_view(self._entry.extent).view(dtype).view(shape)
        return Handle.of(view)

    def write(self, tensor: torch.Tensor, *, computed: bool = False) -> None:
        """Copy a contiguous tensor of `nbytes` bytes, from any device, into the extent; before `commit` only.

        A GPU's tensor that is `computed` waits for no stream. Raises `EmbeddingMismatchError` for a tensor of
        another size. Blocks for the copy.
        """
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes != self.nbytes:
            raise EmbeddingMismatchError(f"a tensor of {nbytes} bytes for {self.nbytes} reserved bytes")
        self._ledger.arena.write(self._entry.extent, tensor, computed=computed)

    def commit(
        self,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        metadata: EmbeddingMetadata = NO_METADATA,
        retain: bool = True,
    ) -> Lease:
        """Make the entry visible under its key, in place of an older one, and return a lease on it.

        Without `retain` no look-up ever finds it, and it is freed with its last holder.
        Raises `EmbeddingMismatchError` when dtype and shape do not come to `nbytes`; it is still open then.
        """
        self._check_size(dtype, shape)
        with self._ledger.guard:
            if retain:
                self._ledger.publish(self._entry, dtype, tuple(shape), metadata)
            else:
                self._ledger.pass_on(self._entry, dtype, tuple(shape), metadata)
            lease = Lease(self._ledger, self._entry)
            self._ledger.end(self._hold)
        return lease

    def _check_size(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        expected = dtype.itemsize * math.prod(shape)
        if expected != self.nbytes or any(size < 0 for size in shape):
            raise EmbeddingMismatchError(
                f"{list(shape)} of {dtype} is {expected} bytes, but {self.nbytes} bytes were reserved"
            )

    def abandon(self) -> None:
        """Free the extent."""
        self._finish("abandon")

    def quarantine(self) -> None:
        """Keep the extent out of use until `settle`. May be called anywhere, also from a finalizer."""
        if self._ledger.guard.owned:
            # A finalizer interrupted another operation of this thread. None of them is in the middle of
            # this entry's step, and a quarantine that fails would let the extent be used again.
            self._entry.advance("quarantine")
            return
        with self._ledger.guard:
            self._entry.advance("quarantine")

    def settle(self) -> None:
        """Free a quarantined extent: nothing can write to it any more."""
        self._finish("settle")

    def _finish(self, event: str) -> None:
        with self._ledger.guard:
            self._ledger.close_reservation(self._entry, event)
            self._ledger.end(self._hold)

    def __repr__(self) -> str:
        return f"<Reservation {self.key[:16]} {self.nbytes} bytes, {self.state.value}, by {self.owner}>"
