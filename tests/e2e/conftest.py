"""Stacks that several tests share, started once each, and two oracles: the truth and the model by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.e2e.cards import Deal, Oracle
from tests.e2e.image_server import ImageServer, image_server
from tests.e2e.stack import REPOSITORY, Stack, launched
from tests.engines.contract import Case, chat_case, reference_inputs, reference_model, reference_processor

CARDS_SEED = 20261124


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Return the model that the stacks serve: the launch script's own, which answers truly."""
    return REPOSITORY / "models/shapes-qwen2-vl"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    """One encode worker and one PD worker with a cache."""
    media = tmp_path_factory.mktemp("media")
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.125",
        "--allow-private-addresses",
        "--allowed-local-media-path",
        str(media),
        MODEL_PATH=str(model_dir),
    ) as running:
        yield running


@pytest.fixture
def images() -> Iterator[ImageServer]:
    """An HTTP server for pictures."""
    with image_server() as server:
        yield server


@pytest.fixture(scope="session")
def oracle(model_dir: Path) -> Oracle:
    """Return what the model itself answers, in this process: Hugging Face's generate(pixel_values)."""

    def answer(images: Sequence[Image.Image], texts: Sequence[str], max_tokens: int = 8) -> str:
        return generate_answer(chat_case(model_dir, list(images), texts), max_tokens)

    return answer


@pytest.fixture(scope="session")
def deal(oracle: Oracle) -> Deal:
    """Cards, with questions that the model answers truly in this process."""
    return Deal(oracle, CARDS_SEED)


def generate_answer(case: Case, max_tokens: int) -> str:
    """Return the greedy answer of the whole model to `case`."""
    model = reference_model(case.model_dir)
    inputs = reference_inputs(case)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    return str(
        reference_processor(case.model_dir).tokenizer.decode(
            tokens[0][prompt_tokens:], skip_special_tokens=True
        )
    )
