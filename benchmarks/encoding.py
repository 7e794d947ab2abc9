"""What engines' benchmarks share: images' files, and transformers' tower that encodes them into an arena."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.settings import ImageLimits

CAPACITY = 1 << 30


def noise(seed: int, width: int, height: int) -> bytes:
    """Return the PNG of an image like no other."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


class CachedTower:
    """A cache before transformers' tower, in this process: of NIXL and the hop `transfer.py` tells."""

    def __init__(self, model: Path, fingerprint: str) -> None:
        args = TransformersEngineArgs(device="cpu", dtype="bfloat16", embedding_dtype="bfloat16")
        self.encoder = TransformersVisionEncoder(model, args)
        self.cache = MultimodalEmbeddingCacheManager(CAPACITY)
        self.encoded = 0
        self._fingerprint = fingerprint

    def known(self, media: bytes) -> Lease | None:
        """Return what a PD worker finds of an image's file, or None of a new one."""
        probe_image(media, ImageLimits())
        return self.cache.lease(self._key(media))

    def lease(self, media: bytes) -> Lease:
        """Encode an image into the cache and hold it. Blocking."""
        self.encoded += 1
        prepared = self.encoder.preprocess(EncodeItem(decode_image(media, ImageLimits())))
        (made,) = self.encoder.encode([prepared])
        if not isinstance(made, EncodedItem):
            raise made
        reservation = self.cache.reserve(self._key(media), made.tensor.nbytes, owner="benchmark")
        reservation.write(made.tensor)
        return reservation.commit(
            dtype=made.tensor.dtype, shape=tuple(made.tensor.shape), metadata=made.metadata
        )

    def close(self) -> None:
        """Free the model and the arena."""
        self.encoder.close()
        self.cache.close()

    def _key(self, media: bytes) -> str:
        return embedding_key(content_digest(media), fingerprint=self._fingerprint).hex
