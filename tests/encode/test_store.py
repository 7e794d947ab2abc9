"""From the tower's output to the committed entry the bytes are copied once, and no memory is made for it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence

import pytest
import torch
from prometheus_client import CollectorRegistry

from tests.e2e.stack import new_image, png
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.maker import EncodeJob
from trtllm_mm_cache.encode.pipeline import EncodePipeline
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.settings import EncodeSettings
from trtllm_mm_cache.transfer import finite
from trtllm_mm_cache.transfer.checksum import checksum

NBYTES = 64 * 1024**2
PAGE_FAULTS = NBYTES // 4096


class ReadyTower:
    """A tower whose output is there: what happens after it is what the test is about."""

    fingerprint = "ab" * 32

    def __init__(self) -> None:
        self.output = torch.rand(2, NBYTES // 8)

    def preprocess(self, item: EncodeItem) -> int:
        return 0

    def prepared_bytes(self, prepared: int) -> int:
        return 0

    def encode(self, batch: Sequence[int]) -> list[EncodedItem | MmCacheError]:
        return [EncodedItem(self.output, EmbeddingMetadata()) for _ in batch]

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the copies that the pass over an embedding makes, by the C function itself."""
    sizes: list[int] = []
    real: Callable[[int, int, int], int] = finite._memmove

    def counted(target: int, source: int, nbytes: int) -> int:
        sizes.append(nbytes)
        return real(target, source, nbytes)

    monkeypatch.setattr(finite, "_memmove", counted)
    return sizes


async def test_between_tower_and_commit_there_is_one_copy_and_no_new_memory(copied: list[int]) -> None:
    tower, manager = ReadyTower(), MultimodalEmbeddingCacheManager(2 * NBYTES)
    pipeline = EncodePipeline(tower, manager, EncodeSettings(model_path="none"), CollectorRegistry())
    try:
        for key in ("warm", "counted"):
            copied.clear()
            job = EncodeJob(key, png(new_image(8, 8)), {}, "", Scope())
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            lease, _ = await pipeline.encode(job)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            with lease:
                assert torch.equal(lease.tensor, tower.output)
                assert lease.metadata.checksum == checksum(tower.output.data_ptr(), NBYTES)
        assert sum(copied) == NBYTES
        assert faults < PAGE_FAULTS / 10
    finally:
        await pipeline.close()
        manager.close()
