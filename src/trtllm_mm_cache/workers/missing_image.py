"""What is known of an image whose embedding is not in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.engines.base import ImageDescription
from trtllm_mm_cache.workers.passages import Passage


@dataclass(frozen=True)
class MissingImage:
    """One image between lookup and commit. Without `retain` its embedding is for one request alone."""

    key: EmbeddingKey
    media: bytes
    description: ImageDescription
    retain: bool
    passage: Passage

    @property
    def dropped(self) -> bool:
        """Whether a drop concerned it since its request came."""
        return self.passage.dropped(self.key.hex)

    @property
    def retained(self) -> bool:
        """Whether it may be stored, as things are now."""
        return self.retain and not self.dropped
