"""The seam of the tiers: what is asked for, what a tier answers, and what it is offered.

A tier finds an embedding and says what lies ready; reserving room for it, the checks and the commit are the
same for all and belong to whoever passes `receive` in (`receive.py`). So a tier never sees the cache, and a
tier that has several places to ask (the encode workers) can try the next one when what the first sent was
wrong.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import Lease, Reservation
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.engines.base import ItemDescription
from trtllm_mm_cache.runtime.admission import Admitted
from trtllm_mm_cache.runtime.drops import DropWatch


@dataclass
class MissingItem:
    """One item between lookup and commit. `watch` tells whether a drop concerned it meanwhile.

    `needs` are the bytes of its request's embeddings by key, as far as they are known, and `filling` the keys
    that its request has undertaken to fill; a request's items share both, and whoever learns of more adds it.
    """

    key: EmbeddingKey
    media: bytes
    description: ItemDescription
    scope: Scope
    watch: DropWatch
    needs: dict[str, int] = field(default_factory=dict)
    filling: set[str] = field(default_factory=set)

    def release_media(self) -> None:
        """Forget the bytes: a flight that has its own is under way."""
        self.media = b""

    @property
    def kind(self) -> str:
        """What it is."""
        return self.description.kind

    @property
    def content(self) -> bytes | None:
        """The digest of its media."""
        return self.watch.content

    @property
    def dropped(self) -> bool:
        """Whether a drop has concerned it."""
        return self.watch.dropped(self.key.hex)

    @property
    def retained(self) -> bool:
        """Whether its embedding may be stored, as things are now."""
        return self.scope.retain and not self.dropped


class Wanted(Protocol):
    """What a tier needs to know of an item: of a PD worker's and of an encode worker's."""

    @property
    def key(self) -> EmbeddingKey:
        """The embedding's key."""
        ...

    @property
    def kind(self) -> str:
        """What the item is."""
        ...

    @property
    def content(self) -> bytes | None:
        """The digest of its media, where it is known."""
        ...

    @property
    def scope(self) -> Scope:
        """Whose it is."""
        ...

    @property
    def retained(self) -> bool:
        """Whether its embedding may be stored, as things are now."""
        ...


WantedItem = TypeVar("WantedItem", bound=Wanted)

Loading = Callable[[MissingItem], AbstractContextManager[Admitted]]
"""Counts what an item holds until its embedding is there, and lets drops wait for that."""


class Found(Protocol):
    """An embedding that lies ready in a tier: `shape` of the torch dtype named `dtype`, `nbytes` in all.

    It ends by exactly one of `read_into` and `release`.
    """

    nbytes: int
    dtype: str
    shape: tuple[int, int]
    metadata: EmbeddingMetadata

    async def read_into(self, reservation: Reservation, *, finite: bool) -> None:
        """Fill `reservation`, checked; with `finite`, NaN and infinity are refused.

        When it raises (also `CancelledError`), the reservation is no longer the caller's: it is abandoned, or
        in quarantine until no byte can arrive any more. Raises `TransferError`.
        """
        ...

    def release(self) -> None:
        """Say that it will not be read. Does not block."""
        ...


Receive = Callable[[MissingItem, Found], Awaitable[Lease]]
"""Reserve, read, check, commit: raises `TransferError`, `InvalidEmbeddingError` or `CacheError`; what was
found has then been released and what was reserved is free again or in quarantine."""


class TierDropped(NamedTuple):
    """What a drop removed from a tier: `entries` of `nbytes` bytes; `unfinished` were still being stored."""

    entries: int = 0
    nbytes: int = 0
    unfinished: int = 0


class Tier(Protocol):
    """One place that embeddings come from. For use from one event loop."""

    name: str
    """For metrics and logs."""

    async def fill(self, item: MissingItem, receive: Receive) -> Lease | None:
        """Bring the embedding of `item` by way of `receive`, or return None where this tier has none.

        Ends within the tier's own deadline. What it raises is a miss to the chain, unless it is the last.
        """
        ...

    async def close(self) -> None:
        """Stop what is under way."""
        ...
