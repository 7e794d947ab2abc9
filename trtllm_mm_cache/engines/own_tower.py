"""What an engine offers that runs the model's vision tower itself, beside the language model.

There a miss has no embedding yet when the prompt goes to the engine: among the request's leases stands a
`MissingEmbedding`. The engine gets the image's pixels, and where to copy what its tower makes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import EmbeddingShape, EncodeItem, Generator
from trtllm_mm_cache.errors import IntegrityError


@dataclass(frozen=True, eq=False)
class PreparedItem:
    """An image as the engine's own tower takes it.

    `pixels` are the engine's own form of it, `nbytes` bytes in all. `shape` and `metadata` are what its
    embedding will have, known before it is encoded. Immutable: requests about the same image share one.
    """

    pixels: Any
    nbytes: int
    shape: EmbeddingShape
    metadata: EmbeddingMetadata


@dataclass(frozen=True)
class Fill:
    """Where the engine copies an embedding, once, and how it says that all of it is there (`write_mark`)."""

    target: Handle
    mark: Handle
    nonce: int


class MissingEmbedding(ABC):
    """Stands among a request's leases for an embedding that the engine's own tower is to make.

    `fill` is None where it is not kept. Like a lease it is held by whoever may still use it, by clones that
    are released on their own: with the last one's release the engine must be done with `fill`.
    """

    def __init__(self, key: str, prepared: PreparedItem, fill: Fill | None) -> None:
        self.key = key
        self.prepared = prepared
        self.fill = fill

    @property
    def dtype(self) -> torch.dtype:
        """As it will be."""
        return self.prepared.shape.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`[rows, width]`, as it will be."""
        return self.prepared.shape.rows, self.prepared.shape.width

    @property
    def nbytes(self) -> int:
        """Bytes of the embedding, as it will be."""
        return self.prepared.shape.nbytes

    @property
    def metadata(self) -> EmbeddingMetadata:
        """As it will be."""
        return self.prepared.metadata

    @property
    def tensor(self) -> torch.Tensor:
        """Raise `IntegrityError`: there is none yet."""
        raise IntegrityError("a missing embedding has no tensor yet")

    def handle(self, *, openers: int = 0) -> Handle:
        """Raise `IntegrityError`: there are no bytes to read yet."""
        raise IntegrityError("a missing embedding cannot be read yet")

    @property
    @abstractmethod
    def filled(self) -> bool:
        """Whether the engine has said that `fill` is done, so that it will not write there any more."""

    @abstractmethod
    def clone(self) -> MissingEmbedding:
        """Return another one for the same embedding, released on its own."""

    @abstractmethod
    def release(self) -> None:
        """Let go. Idempotent."""


class OwnTowerGenerator(Generator, Protocol):
    """A `Generator` that also takes `MissingEmbedding`s among the leases of a request."""

    @property
    def encodes(self) -> int:
        """How many images its tower has encoded since the start. Any thread."""
        ...

    async def prepare(self, item: EncodeItem) -> PreparedItem:
        """Run the model's processor over one image, off the event loop.

        Raises `InvalidRequestError` for unknown or ill-typed `processor_kwargs`, `InvalidImageError` for an
        image that the model's processor refuses.
        """
        ...
