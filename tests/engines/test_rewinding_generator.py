"""A draw that is taken back is drawn again."""

from __future__ import annotations

import torch

from trtllm_mm_cache.engines.vllm.cpu_generators import RewindingGenerator


def test_after_a_draw_is_taken_back_the_same_comes_again() -> None:
    generator = RewindingGenerator(device=torch.device("cpu"))
    generator.manual_seed(7)
    first = torch.empty(9).exponential_(generator=generator)
    generator.set_offset(generator.get_offset() - 4)
    assert torch.equal(torch.empty(9).exponential_(generator=generator), first)
    assert not torch.equal(torch.empty(9).exponential_(generator=generator), first)
