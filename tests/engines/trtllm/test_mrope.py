"""Positions computed from cached grids are Hugging Face's own, for prompts with images of any shape."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.conftest import ModelFactory
from tests.engines.contract import chat_case, picture, reference_inputs, reference_model
from trtllm_mm_cache.engines.trtllm.mrope import merged_rows, mrope_positions

ARCHITECTURES = ("qwen2_5_vl", "qwen3_vl")
SHAPES = [(120, 80), (60, 150), (91, 90), (200, 56)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", range(1, len(SHAPES) + 1))
def test_positions_of_a_chat_are_hugging_faces(model_of: ModelFactory, architecture: str, count: int) -> None:
    model_dir = model_of(architecture)
    images = [picture(seed, *shape) for seed, shape in enumerate(SHAPES[:count])]
    case = chat_case(model_dir, images)
    inputs = reference_inputs(case)
    model = reference_model(model_dir).model
    expected, expected_delta = model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
    assert all(height != width for _, height, width in grids[:2]), "non-square images were meant"
    merge = model.config.vision_config.spatial_merge_size
    ours = mrope_positions(list(case.request.token_ids), model.config.image_token_id, grids, merge)
    assert torch.equal(torch.from_numpy(ours.position_ids), expected)
    assert ours.delta == expected_delta.item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_of_any_prompt_are_hugging_faces(model_of: ModelFactory, architecture: str) -> None:
    model = reference_model(model_of(architecture)).model
    merge, image_token = model.config.vision_config.spatial_merge_size, model.config.image_token_id

    @settings(max_examples=60, deadline=None)
    @given(
        texts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
        sides=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=5, max_size=5),
        ends_with_image=st.booleans(),
    )
    def compare(texts: list[int], sides: list[tuple[int, int]], ends_with_image: bool) -> None:
        rng = random.Random(repr((texts, sides)))
        prompt, expanded, grids = [], [], []
        for number, length in enumerate(texts):
            words = [rng.randrange(300, 400) for _ in range(length)]
            prompt += words
            expanded += words
            if number + 1 < len(texts) or ends_with_image:
                grid = (1, sides[number % 5][0] * merge, sides[number % 5][1] * merge)
                grids.append(grid)
                prompt.append(image_token)
                expanded += [image_token] * merged_rows(grid, merge)
        ids = torch.tensor([expanded])
        expected, delta = model.get_rope_index(
            ids, mm_token_type_ids=(ids == image_token).int(), image_grid_thw=torch.tensor(grids)
        )
        ours = mrope_positions(prompt, image_token, grids, merge)
        assert ours.position_ids.shape == (3, 1, len(expanded))
        assert torch.equal(torch.from_numpy(ours.position_ids), expected)
        assert ours.delta == delta.item()

    compare()


def test_a_missing_grid_is_an_error_not_a_guess() -> None:
    with pytest.raises(ValueError, match="zip"):
        mrope_positions([1, 9, 2, 9], 9, [(1, 4, 4)], 2)


def test_text_after_a_flat_image_goes_on_at_its_longer_side() -> None:
    ours = mrope_positions([1, 9, 2], 9, [(1, 4, 12)], 2)
    assert ours.position_ids[:, 0, 0].tolist() == [0, 0, 0]
    assert ours.position_ids[:, 0, -1].tolist() == [7, 7, 7]
    assert ours.delta == 8 - 14
    assert ours.position_ids.dtype == np.int64
