"""A lease: the promise that one embedding stays where it is."""

from __future__ import annotations

from types import TracebackType

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import EmbeddingMetadata, Entry
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.errors import IntegrityError


class Lease:
    """While it is held, its entry is neither evicted nor rewritten. A context manager; thread-safe.

    Dropping the last reference releases it too. `tensor` has a promise of its own: it
    stays valid after the release, for as long as it or anything derived from it without a copy is alive.
    """

    __slots__ = ("__weakref__", "_entry", "_hold", "_ledger", "_released", "_tensor")

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self._ledger = ledger
        self._entry = entry
        self._tensor: torch.Tensor | None = None
        self._released = False
        self._hold = ledger.hold(self, entry)

    @property
    def key(self) -> str:
        """The key under which the entry was committed."""
        return self._entry.key

    @property
    def nbytes(self) -> int:
        """Size of the embedding in bytes."""
        return self._entry.extent.nbytes

    @property
    def offset(self) -> int:
        """Where the embedding starts, in bytes after the start of the arena; a multiple of 64."""
        return self._entry.extent.offset

    @property
    def address(self) -> int:
        """Where the embedding starts in this process's memory. Read it only while the lease is held."""
        return self._ledger.arena.base_address + self._entry.extent.offset

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the embedding."""
        return self._entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the embedding, `[rows, width]`."""
        return self._entry.shape

    @property
    def metadata(self) -> EmbeddingMetadata:
        """What the embedding was committed with."""
        return self._entry.metadata

    @property
    def content(self) -> bytes | None:
        """The digest of the item's media, where the entry was reserved with it."""
        return self._entry.content

    @property
    def tensor(self) -> torch.Tensor:
        """The embedding, a view into the arena. Do not write to it. `IntegrityError` after the release."""
        tensor = self._tensor
        if tensor is None:
            with self._ledger.guard:
                self._check_held()
                tensor = self._tensor = self._ledger.hand_out_tensor(self._entry)
        return tensor

    def handle(self, *, openers: int = 0) -> Handle:
        """Return how another process opens the embedding; valid only while this lease is held.

        `openers` as in `Handle.of`. Copies nothing. `IntegrityError` after the release.
        """
        self._check_held()
        entry = self._entry
        view = self._ledger.arena.bytes_view(entry.extent).view(entry.dtype).view(entry.shape)
        return Handle.of(view, openers=openers)

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    def clone(self) -> Lease:
        """Return another lease on the entry, released on its own. `IntegrityError` after the release."""
        with self._ledger.guard:
            self._check_held()
            return Lease(self._ledger, self._entry)

    def release(self) -> None:
        """End the lease. Idempotent; may be called anywhere, also from a finalizer."""
        if not self._released:
            self._released = True
            self._tensor = None
            self._ledger.release(self._hold)
            # Another thread may have been inside `tensor` when the flag was set; now none can be.
            self._tensor = None

    def _check_held(self) -> None:
        if self._released:
            raise IntegrityError("the lease was released before")

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Lease {self.key[:16]} {self.nbytes} bytes{' released' if self._released else ''}>"
