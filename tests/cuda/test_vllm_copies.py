"""Copies of vLLM's workers to a GPU, and memory that CUDA refuses to page-lock. Needs no vLLM."""

from __future__ import annotations

import torch

from tests.cuda.test_copies import copies as kinds_of_copies
from tests.engines.vllm_copies import CopiesContract
from trtllm_mm_cache.cache.arena.page_lock import page_lock
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.vllm.copies import Copies


class TestCudaCopies(CopiesContract):
    device = torch.device("cuda", 0)

    def test_a_copy_is_one_and_from_page_locked_memory(
        self, copies: Copies, cache: MultimodalEmbeddingCacheManager
    ) -> None:
        with self.lease(cache, 1) as lease:
            seen = kinds_of_copies(lambda: copies.copy(lease.tensor))
        assert len(seen) == 1
        assert "Pinned" in seen[0]

    def test_nobody_waits_for_the_models_stream(
        self, copies: Copies, cache: MultimodalEmbeddingCacheManager
    ) -> None:
        with self.lease(cache, 1) as lease:
            copies.copy(lease.tensor)  # page-locks
            torch.cuda.synchronize()
            model = torch.cuda.Event()
            torch.cuda._sleep(2_000_000_000)  # about a second
            model.record()
            copy = copies.copy(lease.tensor)
            copies.wait()
            assert not model.query()
            assert torch.equal(copy.cpu(), lease.tensor)


def test_after_a_refusal_the_next_kernel_runs(manager: MultimodalEmbeddingCacheManager) -> None:
    arena = manager.arena
    assert not page_lock(arena.base_address, arena.capacity_bytes), "it is page-locked already"
    assert torch.arange(3, device="cuda").add(1).tolist() == [1, 2, 3]
