"""The trained weights: small, complete, loadable by the engine, and true."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from tests.engines.contract import reference_model, reference_processor
from tools.demo_model.pictures import GRIDS, draw, random_scene
from tools.demo_model.scoring import Answerer, Result, held_out, score, table
from tools.demo_model.tokenizer import make_tokenizer
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

SEED = 20261124
"""Of questions that neither training nor the table in models/README.md has seen."""


@pytest.fixture(scope="module")
def results(model_dir: Path) -> list[Result]:
    print(f"seed {SEED}")
    return list(score(model_dir, held_out(100, SEED), SEED))


def test_the_files_are_small_and_half_precision(model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert 2_000_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 5_000_000
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_tokenizer_is_the_one_the_tools_make(model_dir: Path) -> None:
    stored, made = AutoTokenizer.from_pretrained(model_dir), make_tokenizer()
    assert stored.get_vocab() == made.get_vocab()
    assert stored.chat_template == made.chat_template


def test_the_engine_encodes_what_transformers_encodes(model_dir: Path) -> None:
    encoder = TransformersVisionEncoder(model_dir, TransformersEngineArgs(device="cpu"))
    rng = random.Random(0)
    for grid in GRIDS:
        picture = draw(random_scene(rng, grid))
        (encoded,) = encoder.encode([encoder.preprocess(EncodeItem(picture))])
        assert isinstance(encoded, EncodedItem)
        images = reference_processor(model_dir).image_processor([picture], return_tensors="pt")
        with torch.inference_mode():
            (expected,) = reference_model(model_dir).get_image_features(**images).pooler_output
        assert encoded.tensor.shape == (grid[0] * grid[1], expected.shape[1])
        assert torch.equal(encoded.tensor, expected)
    encoder.close()


def test_answers_are_true(results: list[Result]) -> None:
    """The bar is 95 %."""
    wrong = [(result.case.question, result.answer) for result in results if not result.right]
    assert len(wrong) <= 5, wrong


def test_another_pictures_embedding_gives_another_answer(results: list[Result]) -> None:
    """The bar is 15 %; guessing from the question alone would keep every answer."""
    kept = [result.case.question for result in results if not result.misled]
    assert len(kept) <= 22, kept


def test_the_order_of_two_pictures_decides(model_dir: Path) -> None:
    answerer = Answerer(model_dir)
    cases = [case for case in held_out(400, SEED) if case.question.kind == "which picture"]
    turned = {"the first": "the second", "the second": "the first"}
    right = 0
    for case in cases:
        first, second = (draw(scene) for scene in case.scenes)
        right += answerer.answer([second, first], case.question.text) == turned[case.question.answer]
    assert right >= 0.8 * len(cases)


def test_the_table_counts_every_case_once_by_kind(results: list[Result]) -> None:
    lines = {line.name: line for line in table(results)}
    kinds = {result.case.question.kind for result in results}
    for column in ("asked", "right", "kept"):
        whole = getattr(lines["all"], column)
        assert sum(getattr(lines[kind], column) for kind in kinds) == whole
    assert lines["all"].asked == len(results)
