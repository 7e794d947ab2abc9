"""A lease: the promise that one embedding stays where it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from trtllm_mm_cache.cache.entry import CachedEmbedding, Entry
from trtllm_mm_cache.cache.ledger import Ledger
from trtllm_mm_cache.errors import IntegrityError


class Lease:
    """While it is held, its entry is neither evicted nor rewritten. A context manager; thread-safe.

    Dropping the last reference releases it too. The tensor of `embedding` has a promise of its own: it
    stays true after the release, for as long as it or anything derived from it without a copy is alive.
    """

    __slots__ = ("__weakref__", "_embedding", "_entry", "_hold", "_ledger", "_released")

    def __init__(self, ledger: Ledger, entry: Entry) -> None:
        self._ledger = ledger
        self._entry = entry
        self._embedding: CachedEmbedding | None = None
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
    def metadata(self) -> Mapping[str, Any]:
        """The embedding's metadata, without making its tensor; empty when it was committed with none."""
        return self._entry.details.metadata or {}

    @property
    def embedding(self) -> CachedEmbedding:
        """The embedding, its tensor a view into the arena. Do not write to it.

        Raises `IntegrityError` after the release.
        """
        embedding = self._embedding
        if embedding is None:
            with self._ledger.guard:
                self._check_held()
                embedding = self._embedding = self._ledger.hand_out(self._entry)
        return embedding

    @property
    def shared_tensor(self) -> torch.Tensor:
        """The embedding as a view on the arena's own shared storage: what to hand to another process.

        torch makes a handle of it (a file name and an offset) without copying. Unlike the tensor of
        `embedding` it pins nothing: it is true only while this lease is held. `IntegrityError` after
        the release.
        """
        self._check_held()
        entry = self._entry
        return self._ledger.arena.bytes_view(entry.extent).view(entry.dtype).view(entry.shape)

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
        """Let go. Idempotent; may be called anywhere, also from a finalizer."""
        if not self._released:
            self._released = True
            self._embedding = None
            self._ledger.let_go(self._hold)
            # Another thread may have been inside `embedding` when the flag was set; now none can be.
            self._embedding = None

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
