"""Two ranks compute what one computes, out of the same memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.conftest import Halves
from tests.mpi.job import ARENA_BYTES
from tests.mpi.jobs import START_TIMEOUT_S, mpirun
from tests.mpi.scenarios import ONE_THREAD, SAMPLINGS, answers
from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.transformers import load_generator, load_vision_encoder

# Positions from grids and features in a list; plain positions and the tiles' features in one tensor.
ARCHITECTURES = ("qwen2_vl", "smolvlm")
LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Results:
    """What `scenarios.answers` gave with one rank in this process, and with two."""

    one: dict[str, Any]
    two: dict[str, Any]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the scenario both ways; the mpirun job must end by itself, with status 0."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "pd.yaml").write_text(ONE_THREAD)
    model_dir = make_tiny_model(request.param, folder / "model")
    with mpirun(2, folder, "-m", "tests.mpi.job", "answers", str(model_dir), str(folder)) as job:
        one = asyncio.run(alone(model_dir, folder))
        assert job.wait_ended(START_TIMEOUT_S) == 0, job.output
    return Results(one, torch.load(folder / "result.pt", weights_only=False))


async def alone(model_dir: Path, folder: Path) -> dict[str, Any]:
    """Run the scenario with one rank."""
    threads = torch.get_num_threads()
    encoder, generator = (
        load(model_dir, folder / "pd.yaml") for load in (load_vision_encoder, load_generator)
    )
    halves = Halves(model_dir, encoder, generator, MultimodalEmbeddingCacheManager(ARENA_BYTES))  # type: ignore[arg-type]
    try:
        return await answers(halves)
    finally:
        await generator.close()
        encoder.close()
        torch.set_num_threads(threads)


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the largest difference between two lists of logits."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def test_logits_agree_with_one_rank(results: Results) -> None:
    assert largest_difference(results.two["logits"], results.one["logits"]) < LARGEST_DIFFERENCE


def test_answers_are_equal(results: Results) -> None:
    assert results.two["answers"] == results.one["answers"]


def test_logprobs_constraints_and_refusals_agree_too(results: Results) -> None:
    """Among the answers that are compared there must be some with each of them."""
    assert any(answer.logprobs for answer in results.two["answers"])
    constrained = results.two["answers"][len(SAMPLINGS) - 1 :: len(SAMPLINGS)]
    assert {answer.finish_reason for answer in constrained} == {"stop"}
    assert results.two["refused"] == [True] * 3


def test_a_stop_string_ends_all_ranks(results: Results) -> None:
    assert results.two["stopped"] == results.one["stopped"]
    assert {answer.finish_reason for answer in results.two["stopped"]} == {"stop"}
    assert all(1 < len(answer.tokens) < 30 for answer in results.two["stopped"])


def test_a_cancelled_answer_ends_all_ranks(results: Results) -> None:
    """What was asked after each of them is what the other tests look at."""
    assert results.two["cancelled"] == [True, True, True]


def test_both_ranks_see_a_write_by_rank_0(results: Results) -> None:
    """With a copy on the other rank, half of the model would still see the first picture."""
    first, other, rewritten = results.two["rewritten"]
    assert torch.equal(rewritten, other)
    assert (first - other).abs().max() > 100 * LARGEST_DIFFERENCE


def test_both_ranks_map_the_same_file_and_no_other(results: Results) -> None:
    assert results.two["followers"] == [{results.two["arena"]}]


def test_resident_memory_is_the_capacity_once(results: Results) -> None:
    assert ARENA_BYTES <= sum(results.two["resident"]) < 1.1 * ARENA_BYTES
