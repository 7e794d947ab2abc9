"""An engine with a tower of its own, in the tests' hands: they fill what it is told to fill."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from PIL import Image
from prometheus_client import CollectorRegistry

from trtllm_mm_cache.cache.arena.handle import OpenArenas
from trtllm_mm_cache.cache.arena.marks import write_mark
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope, Selection
from trtllm_mm_cache.engines.base import EmbeddingShape, EncodeItem, ItemDescription
from trtllm_mm_cache.engines.own_tower import Fill, MissingEmbedding, PreparedItem
from trtllm_mm_cache.errors import InvalidImageError, OverloadedError
from trtllm_mm_cache.runtime.admission import Admission, Admitted
from trtllm_mm_cache.runtime.drops import Drops
from trtllm_mm_cache.settings import PdSettings
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.filling import HeldFilling
from trtllm_mm_cache.tiers.own_tower import OwnTower

WIDTH = 48
"""Three deepstack levels beside 12 columns: what counts is the whole width."""


class HandFilledEngine:
    """`OwnTowerGenerator` as far as misses need it. An image has a row a column; one 13 high is refused."""

    def __init__(self) -> None:
        self.encodes = self.prepared = 0
        self.preparing = asyncio.Event()
        self.preparing.set()

    def check_embedding(self, *_: object) -> None:
        """Every embedding fits every item here."""

    async def prepare(self, item: EncodeItem) -> PreparedItem:
        self.prepared += 1
        await self.preparing.wait()
        rows, height = item.image.size
        if height == 13:
            raise InvalidImageError("the model cannot take this image")
        shape = EmbeddingShape(rows, WIDTH, torch.float32)
        return PreparedItem(object(), 1000, shape, EmbeddingMetadata(placeholder="<image>" * rows))


def tensor_of(held: MissingEmbedding, value: float = 1.0) -> torch.Tensor:
    """Return what the tower makes: of its key, so that each image's is its own."""
    generator = torch.Generator().manual_seed(int(held.key[:8], 16))
    made = torch.rand(held.shape, generator=generator)
    made[0, 0] = value
    return made


def fill(held: HeldFilling, made: torch.Tensor | None = None, *, checksum: int | None = None) -> torch.Tensor:
    """Do what a worker of the engine does; `checksum` is what it says of the bytes: the true one."""
    assert isinstance(held.fill, Fill)
    made = tensor_of(held) if made is None else made
    arenas = OpenArenas()
    arenas.tensor(held.fill.target).copy_(made)
    true = xxhash.xxh3_64_intdigest(made.numpy().tobytes())
    write_mark(arenas.tensor(held.fill.mark), held.fill.nonce, true if checksum is None else checksum)
    return made


def image_of(seed: int, rows: int = 8, height: int = 4) -> bytes:
    """Return the file of an image whose embedding has `rows` rows."""
    file = io.BytesIO()
    Image.new("RGB", (rows, height), (seed % 256, seed // 256, 77)).save(file, "PNG")
    return file.getvalue()


@dataclass
class TowerBench:
    """An `OwnTower` over a cache of `capacity` bytes, without a resolver."""

    capacity: int = 1 << 20
    engine: HandFilledEngine = field(default_factory=HandFilledEngine)
    drops: Drops = field(default_factory=Drops)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    wait_s: float = 30.0
    stored: StoredTiers = field(default_factory=StoredTiers)

    def __post_init__(self) -> None:
        settings = PdSettings(model_path="m", disaggregation_mode="agg", encode_timeout_s=self.wait_s)
        self.cache = MultimodalEmbeddingCacheManager(self.capacity)
        self.tower = OwnTower(
            self.cache,
            None,
            self.engine,  # type: ignore[arg-type]
            settings,
            self.registry,
            self.stored,
        )
        self.waiting = Admission(
            max_items=10**6, max_bytes=10**9, refusal=lambda: OverloadedError("too much")
        )
        self._requests = itertools.count()

    def item(self, media: bytes, *, filling: set[str] | None = None, scope: Scope = Scope()) -> MissingItem:
        """Return an item of a request; items that share `filling` are of one."""
        watch = self.drops.watch(scope.tag)
        watch.content = content_digest(media)
        key = embedding_key(watch.content, fingerprint="f" * 64, scope=scope)
        together = set[str]() if filling is None else filling
        return MissingItem(key, media, ItemDescription(8, 8), scope, watch, {}, together)

    async def find(self, media: bytes, **options: Any) -> Lease | HeldFilling:
        """Return what stands for an image's embedding."""
        held, _ = await self.tower.find(self.item(media, **options), self.loading)
        return held

    async def miss(self, media: bytes, **options: Any) -> HeldFilling:
        """Do that for an image that nobody has."""
        held = await self.find(media, **options)
        assert isinstance(held, HeldFilling)
        return held

    @contextmanager
    def loading(self, item: MissingItem) -> Iterator[Admitted]:
        """As the resolver does it."""
        with (
            self.waiting.admitted(len(item.media)) as admitted,
            self.drops.loading(item.key.hex, item.watch),
        ):
            yield admitted

    async def settled(self) -> None:
        """Wait until nothing is checked any more."""
        while self.tower.checks._tasks:
            await asyncio.wait(self.tower.checks._tasks)

    async def drop_all(self, deadline_s: float = 5) -> int:
        """Do what a drop does to what is under way."""
        self.drops.drop(Selection())
        self.cache.drop_selected(Selection())
        return await self.drops.ended(Selection(), deadline_s=deadline_s)
