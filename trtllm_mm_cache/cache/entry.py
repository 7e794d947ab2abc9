"""What an entry is: the public `CachedEmbedding`, and the record the manager keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from trtllm_mm_cache.cache.arena.extents import Extent
from trtllm_mm_cache.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class EmbeddingMetadata:
    """What is known of an embedding besides its tensor; the same from the vision tower to the last tier.

    `grid_thw` is `[t, h, w]` in patches where the architecture lays rows out by a grid, `placeholder` the
    exact text that the item's placeholder in the prompt expands to where the engine expands text.
    `encode_seconds` is what the vision tower took for it, `checksum` XXH3-64 over the bytes where it was
    computed.
    """

    grid_thw: tuple[int, int, int] | None = None
    placeholder: str | None = None
    encode_seconds: float = 0.0
    checksum: int | None = None


NO_METADATA = EmbeddingMetadata()
"""Nothing is known."""


class CachedEmbedding(NamedTuple):
    """One embedding as Dynamo's cache of the same name takes and gives it: five fields.

    `tensor` is `[rows, width]`; what `get` returns is a view into the arena on the CPU that stays valid as
    long as the tensor, or anything derived from it without a copy, is alive. The other fields are kept as
    they were given; of an entry that was committed with `EmbeddingMetadata`, `image_grid_thw`
    has its grid as the only row.
    """

    tensor: torch.Tensor
    image_grid_thw: list[Any] | None = None
    video_grid_thw: list[Any] | None = None
    second_per_grid_ts: float | None = None
    video_timestamps: list[float] | None = None


class CacheMutation(NamedTuple):
    """What `set_with_delta` did: whether the entry is stored, and which keys came and went."""

    stored: bool
    added_keys: list[str]
    removed_keys: list[str]


class CacheReservation(NamedTuple):
    """What `make_room_for` did: whether an entry of that size can be stored, and which keys were evicted."""

    admitted: bool
    removed_keys: list[str]


class EntryState(StrEnum):
    """Where an extent stands between being allocated and being freed."""

    RESERVED = "reserved"  # being written
    QUARANTINED = "quarantined"  # a write may still arrive, no caller waits for it
    VISIBLE = "visible"  # look-ups find it
    WITHDRAWN = "withdrawn"  # no look-up finds it; freed with its last holder's end
    FREED = "freed"  # the extent may belong to another entry


# The whole life of an extent. Anything else is a defect of the caller and raises IntegrityError.
TRANSITIONS: dict[tuple[EntryState, str], EntryState] = {
    (EntryState.RESERVED, "commit"): EntryState.VISIBLE,
    (EntryState.RESERVED, "pass"): EntryState.WITHDRAWN,
    (EntryState.RESERVED, "abandon"): EntryState.WITHDRAWN,
    (EntryState.RESERVED, "quarantine"): EntryState.QUARANTINED,
    (EntryState.QUARANTINED, "settle"): EntryState.WITHDRAWN,
    (EntryState.VISIBLE, "withdraw"): EntryState.WITHDRAWN,
    (EntryState.WITHDRAWN, "free"): EntryState.FREED,
}


class Entry:
    """An extent and what is known about its content. Guarded by the manager's lock.

    `holders` counts leases and tensors that are alive, and the open reservation. `owner` says who
    reserved it; `tag` and `content` mark entries that can be dropped together. `dtype`, `shape`, `metadata`,
    `dynamo_fields` (those of a `CachedEmbedding` after its tensor) and `committed_at` (seconds of the
    cache's clock) mean something once it is visible.
    """

    __slots__ = (
        "committed_at",
        "content",
        "dtype",
        "dynamo_fields",
        "extent",
        "holders",
        "key",
        "metadata",
        "owner",
        "shape",
        "state",
        "tag",
    )

    def __init__(
        self, key: str, extent: Extent, owner: str, tag: bytes | None = None, content: bytes | None = None
    ) -> None:
        self.key = key
        self.extent = extent
        self.owner = owner
        self.tag = tag
        self.content = content
        self.state = EntryState.RESERVED
        self.holders = 0
        self.dtype = torch.uint8
        self.shape: tuple[int, ...] = (extent.nbytes,)
        self.metadata = NO_METADATA
        self.dynamo_fields: tuple[Any, ...] = ()
        self.committed_at = 0.0

    def advance(self, event: str) -> None:
        """Go to the next state. Raises `IntegrityError` when `TRANSITIONS` has no such step."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise IntegrityError(f"cannot {event} an extent that is {self.state.value} (owner: {self.owner})")
        self.state = following
