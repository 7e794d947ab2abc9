"""Tiny models are complete, the same every time, and small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.engines.conftest import ModelFactory
from tests.engines.contract import ARCHITECTURES, chat_case, pictures, reference_model, reference_processor
from tools.tiny_models import ARCHITECTURES as RECIPES
from tools.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]


def content(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(model_dir.iterdir())}


def test_there_is_a_recipe_for_every_architecture() -> None:
    assert set(RECIPES) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_seed_decides_every_byte(architecture: str, model_of: ModelFactory, tmp_path: Path) -> None:
    again = content(make_tiny_model(architecture, tmp_path / "again"))
    other = content(make_tiny_model(architecture, tmp_path / "other", seed=1))
    assert again == content(model_of(architecture))
    assert {name for name in again if again[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frontend_finds_what_it_needs(architecture: str, model_of: ModelFactory) -> None:
    model_dir = model_of(architecture)
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((model_dir / name).read_text())
    assert json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    case = chat_case(model_dir, pictures(2))
    placeholder = reference_processor(model_dir).image_token
    ids = tokenizer.encode(case.prompt, add_special_tokens=False).ids
    assert tuple(ids) == case.request.token_ids
    assert ids.count(tokenizer.token_to_id(placeholder)) == case.prompt.count(placeholder) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_weight_is_left_at_zero(architecture: str, model_of: ModelFactory) -> None:
    """Gemma's projector starts at zero in Hugging Face's own initialisation: every image looks alike."""
    for name, parameter in reference_model(model_of(architecture)).named_parameters():
        assert (parameter != 0).any(), name


def test_the_demo_is_small(model_of: ModelFactory) -> None:
    assert sum(len(data) for data in content(model_of("qwen2_vl")).values()) < 10_000_000


def test_the_command_line(model_of: ModelFactory, tmp_path: Path) -> None:
    command = [sys.executable, "tools/make_tiny_model.py", "--architecture", "llava", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert str(tmp_path) in done.stdout
    assert content(tmp_path) == content(model_of("llava"))
