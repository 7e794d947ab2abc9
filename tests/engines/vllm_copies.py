"""What vLLM's workers rely on when they copy, whatever their device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.vllm.copies import Copies, copies_for

MB = 1024**2
ROWS, WIDTH = 700, 1024


class CopiesContract:
    """A suite over `Copies`; its subclasses name the device."""

    device: torch.device

    @pytest.fixture
    def copies(self) -> Copies:
        return copies_for(self.device)

    @pytest.fixture
    def cache(self) -> Iterator[MultimodalEmbeddingCacheManager]:
        cache = MultimodalEmbeddingCacheManager(64 * MB)
        yield cache
        cache.check_integrity()
        cache.close()

    def lease(self, cache: MultimodalEmbeddingCacheManager, value: float) -> Lease:
        """Return an entry of the arena with rows of `value` and more."""
        made = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) + value
        reservation = cache.reserve(str(value), made.nbytes, owner="test")
        reservation.write(made)
        return reservation.commit(dtype=made.dtype, shape=tuple(made.shape))

    def test_a_copy_is_on_the_device_and_outlives_the_extent(
        self, copies: Copies, cache: MultimodalEmbeddingCacheManager
    ) -> None:
        with self.lease(cache, 1) as lease:
            expected = lease.tensor.clone()
            copy = copies.copy(lease.tensor)
            copies.wait()
            lease.tensor.fill_(-1)  # the extent is another image's now
        assert copy.device.type == self.device.type
        assert torch.equal(copy.cpu(), expected)

    def test_copies_of_several_entries_do_not_mix(
        self, copies: Copies, cache: MultimodalEmbeddingCacheManager
    ) -> None:
        leases = [self.lease(cache, value) for value in range(8)]
        found = [copies.copy(lease.tensor) for lease in leases]
        sums = [copy.sum(dtype=torch.float64).item() for copy in found]  # used at once, without `wait`
        assert sums == [lease.tensor.sum(dtype=torch.float64).item() for lease in leases]
        copies.wait()
        for lease in leases:
            lease.release()

    def test_what_was_just_computed_is_in_the_extent_when_store_returns(
        self, copies: Copies, cache: MultimodalEmbeddingCacheManager
    ) -> None:
        for turn in range(5):
            matrix = torch.rand(WIDTH, WIDTH, device=self.device)
            made = matrix @ matrix @ matrix
            reservation = cache.reserve(str(turn), made.nbytes, owner="test")
            target = reservation.view.view(made.dtype).view(made.shape)
            copies.store(made, target)
            assert torch.equal(target, made.cpu())
            del target
            reservation.abandon()

    def test_zeros(self, copies: Copies) -> None:
        zeros = copies.zeros((3, WIDTH), torch.bfloat16)
        assert (zeros.shape, zeros.dtype, zeros.device.type) == (
            (3, WIDTH),
            torch.bfloat16,
            self.device.type,
        )
        assert not zeros.any()
