"""Prefill logits over cached embeddings are those of the whole model in one process, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tests.engines.conftest import Halves
from tests.engines.contract import (
    WITH_GRID,
    Case,
    assert_bit_equal,
    assert_clearly_different,
    assert_logits_are_the_models_own,
    chat_case,
    picture,
    pictures,
    reference_inputs,
    reference_logits,
    reference_model,
)
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import EncodedItem, SamplingParams
from trtllm_mm_cache.errors import EmbeddingMismatchError


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_logits_are_the_models_own(halves: Halves, count: int) -> None:
    case = chat_case(halves.model_dir, pictures(count))
    leases = halves.carry(case.items(halves.generator.variant(count)))
    assert_logits_are_the_models_own(halves.generator, case, leases)


def test_order_of_requests_does_not_matter(halves: Halves) -> None:
    with_image, text_only = chat_case(halves.model_dir, pictures(1)), chat_case(halves.model_dir, [])
    leases = halves.carry(with_image.items(halves.generator.variant(1)))
    first = halves.generator.prefill_logits(with_image.request, leases)
    text = halves.generator.prefill_logits(text_only.request, [])
    assert_bit_equal(halves.generator.prefill_logits(with_image.request, leases), first)
    assert_bit_equal(halves.generator.prefill_logits(text_only.request, []), text)


def test_another_image_shows(halves: Halves) -> None:
    case = chat_case(halves.model_dir, [picture(1, 120, 80)])
    other = chat_case(halves.model_dir, [picture(5, 120, 80)])
    leases = halves.carry(other.items(halves.generator.variant(1)))
    assert_clearly_different(halves.generator.prefill_logits(case.request, leases), reference_logits(case))


def test_swapped_images_show(halves: Halves) -> None:
    case = chat_case(halves.model_dir, [picture(1, 120, 80), picture(5, 120, 80)])
    first, second = halves.carry(case.items(halves.generator.variant(2)))
    swapped = halves.generator.prefill_logits(case.request, [second, first])
    assert_clearly_different(swapped, reference_logits(case))


@pytest.mark.parametrize("architecture", WITH_GRID)
def test_the_grid_decides_positions(architecture: str, halves_of: Callable[[str], Halves]) -> None:
    halves = halves_of(architecture)
    case = chat_case(halves.model_dir, [picture(1, 120, 80)])
    encoded = halves.encode(case.items("")[0])
    assert encoded.metadata.grid_thw is not None
    t, h, w = encoded.metadata.grid_thw
    assert h != w

    def logits(grid: tuple[int, int, int] | None) -> torch.Tensor:
        metadata = replace(encoded.metadata, grid_thw=grid)
        return halves.generator.prefill_logits(
            case.request, [halves.lease(EncodedItem(encoded.tensor, metadata))]
        )

    with_grid = reference_logits(case)
    assert_clearly_different(logits((t, w, h)), with_grid)
    for grid in (None, (t, h, w + 2)):
        with pytest.raises(EmbeddingMismatchError, match="grid"):
            logits(grid)


def test_deepstack_levels_reach_the_decoder(halves_of: Callable[[str], Halves]) -> None:
    halves = halves_of("qwen3_vl")
    case = chat_case(halves.model_dir, [picture(1, 120, 80)])
    encoded = halves.encode(case.items("")[0])
    expected = reference_logits(case)
    hidden = encoded.tensor.shape[1] // 3
    for level in (1, 2):
        tensor = encoded.tensor.clone()
        tensor[:, level * hidden : (level + 1) * hidden] = 0
        lease = halves.lease(EncodedItem(tensor, encoded.metadata))
        assert_clearly_different(halves.generator.prefill_logits(case.request, [lease]), expected)


def test_the_pd_side_never_runs_a_vision_tower(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tower broken the reference fails, and the PD side still gives its logits."""
    case = chat_case(halves.model_dir, pictures(1))
    leases = halves.carry(case.items(halves.generator.variant(1)))
    expected = reference_logits(case)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a vision tower ran")

    base_model = reference_model(case.model_dir).base_model
    towers = [getattr(base_model, name, None) for name in ("visual", "vision_tower", "vision_model")]
    for tower in filter(None, towers):
        monkeypatch.setattr(type(tower), "forward", broken)
    with pytest.raises(AssertionError, match="a vision tower ran"):
        reference_logits(case)
    assert_bit_equal(halves.generator.prefill_logits(case.request, leases), expected)


async def answer(halves: Halves, case: Case, leases: Sequence[Lease]) -> list[int]:
    """Return 40 greedy tokens: more than the sliding windows of the tiny models are long."""
    request = replace(case.request, sampling=SamplingParams(max_tokens=40, ignore_eos=True))
    stream = halves.generator.generate(request, leases)
    return [token async for delta in stream for token in delta.token_ids]


def reference_answer(case: Case) -> list[int]:
    """Return what the whole model answers when it has answered nothing before."""
    model, inputs = reference_model(case.model_dir), reference_inputs(case)
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


async def test_answers_are_the_models_own_whatever_was_asked_before(halves: Halves) -> None:
    """Decoding goes on from the right positions: Qwen's models keep offsets from one call to the next."""
    with_images, text_only = chat_case(halves.model_dir, pictures(2)), chat_case(halves.model_dir, [])
    leases = halves.carry(with_images.items(halves.generator.variant(2)))
    for _ in range(2):
        assert await answer(halves, with_images, leases) == reference_answer(with_images)
        assert await answer(halves, text_only, []) == reference_answer(text_only)
