"""Each worker loads its half of a model and nothing else; what does not fit fails the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.engines.conftest import ModelFactory
from tests.engines.contract import ARCHITECTURES, reference_model
from trtllm_mm_cache.engines.huggingface.model_files import read_config
from trtllm_mm_cache.engines.transformers import (
    TransformersEngineArgs,
    TransformersGenerator,
    TransformersVisionEncoder,
)
from trtllm_mm_cache.engines.transformers.loading import load_text_half, load_vision_half
from trtllm_mm_cache.errors import ConfigurationError, IntegrityError

CPU = TransformersEngineArgs(device="cpu")


@pytest.fixture
def copy_of(model_of: ModelFactory, tmp_path: Path) -> Callable[[str], Path]:
    """Return a model directory that a test may change."""
    return lambda architecture: Path(shutil.copytree(model_of(architecture), tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_halves_make_the_whole(architecture: str, model_of: ModelFactory) -> None:
    model_dir = model_of(architecture)
    config, entry = read_config(model_dir)
    vision = load_vision_half(model_dir, config, entry, CPU)
    text = load_text_half(model_dir, config, entry, CPU)
    whole = reference_model(model_dir).state_dict()
    parts = {f"model.{name}": tensor for name, tensor in vision.state_dict().items()}
    shared = parts.keys() & text.state_dict().keys()
    assert not {name for name in shared if "newline" not in name}
    assert (parts | text.state_dict()).keys() == whole.keys()
    for name, tensor in (parts | text.state_dict()).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_absent_half_cannot_be_called(architecture: str, model_of: ModelFactory) -> None:
    model_dir = model_of(architecture)
    config, entry = read_config(model_dir)
    vision = load_vision_half(model_dir, config, entry, CPU)
    with pytest.raises(IntegrityError, match="PD worker alone"):
        vision.get_submodule(entry.text_module)(torch.zeros(1))
    text = load_text_half(model_dir, config, entry, CPU)
    for name in entry.vision_modules:
        with pytest.raises(IntegrityError, match="encode worker alone"):
            text.base_model.get_submodule(name)(torch.zeros(1))


def test_an_architecture_that_is_not_served(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    edit(model_dir / "config.json", model_type="llama")
    for half in (TransformersVisionEncoder, TransformersGenerator):
        with pytest.raises(ConfigurationError, match=r"'llama'.*gemma3.*qwen3_vl"):
            half(model_dir, CPU)


def test_a_config_that_cannot_be_read(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    for content in ("{", '{"model_type": "never-heard-of"}'):
        (model_dir / "config.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"config\.json"):
            read_config(model_dir)


@pytest.mark.parametrize(
    ("half", "lost"),
    [
        (TransformersVisionEncoder, "multi_modal_projector.linear_1.weight"),
        (TransformersGenerator, "language_model.model.norm.weight"),
    ],
)
def test_missing_weights_are_not_made_up(copy_of: Callable[[str], Path], half: Any, lost: str) -> None:
    model_dir = copy_of("llava")
    weights = load_file(model_dir / "model.safetensors")
    (key,) = [name for name in weights if name.split(".")[-3:] == lost.split(".")[-3:]]
    del weights[key]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"do not fit.*{lost.split('.')[-2]}"):
        half(model_dir, CPU)


def test_the_other_half_may_be_missing(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    weights = load_file(model_dir / "model.safetensors")
    vision_only = {name: tensor for name, tensor in weights.items() if "language_model" not in name}
    vision_only = {name: tensor for name, tensor in vision_only.items() if "lm_head" not in name}
    assert 0 < len(vision_only) < len(weights)
    save_file(vision_only, model_dir / "model.safetensors", metadata={"format": "pt"})
    TransformersVisionEncoder(model_dir, CPU).close()


def test_weights_of_another_shape(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    weights = load_file(model_dir / "model.safetensors")
    (key,) = [name for name in weights if name.endswith("multi_modal_projector.linear_2.weight")]
    weights[key] = weights[key][:-1].clone()
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="linear_2"):
        TransformersVisionEncoder(model_dir, CPU)


def test_damaged_weights(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    content = (model_dir / "model.safetensors").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not weights"):
        (model_dir / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="weights cannot be read"):
            TransformersGenerator(model_dir, CPU)


def test_a_processor_of_another_kind(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    edit(model_dir / "processor_config.json", processor_class="PixtralProcessor")
    with pytest.raises(ConfigurationError, match="PixtralProcessor"):
        TransformersVisionEncoder(model_dir, CPU)


def test_no_preprocessor_configuration(copy_of: Callable[[str], Path]) -> None:
    model_dir = copy_of("llava")
    (model_dir / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="processor"):
        TransformersVisionEncoder(model_dir, CPU)


def test_files_that_do_not_fit_each_other_fail_the_start(copy_of: Callable[[str], Path]) -> None:
    """The processor counts tokens with a patch size of its own; requests would fail one by one."""
    model_dir = copy_of("llava")
    edit(model_dir / "processor_config.json", patch_size=28)
    with pytest.raises(ConfigurationError, match="rows"):
        TransformersVisionEncoder(model_dir, CPU)


def test_settings_refuse_what_they_do_not_know() -> None:
    for wrong in ({"devise": "cpu"}, {"dtype": "int8"}, {"torch_threads": 0}, {"max_model_len": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            TransformersEngineArgs(**wrong)


def test_settings_resolve_on_the_cpu() -> None:
    args = TransformersEngineArgs(device="cpu")
    assert args.resolved_dtype() == args.resolved_embedding_dtype() == torch.float32
    half = TransformersEngineArgs(device="cpu", dtype="bfloat16")
    assert half.resolved_dtype() == half.resolved_embedding_dtype() == torch.bfloat16
    stored = TransformersEngineArgs(device="cpu", embedding_dtype="float16")
    assert (stored.resolved_dtype(), stored.resolved_embedding_dtype()) == (torch.float32, torch.float16)


def test_both_halves_report_one_fingerprint(model_of: ModelFactory) -> None:
    model_dir = model_of("llava")
    other = TransformersEngineArgs(device="cpu", dtype="bfloat16", embedding_dtype="float32")
    fingerprints = {
        half(model_dir, args).fingerprint
        for half in (TransformersVisionEncoder, TransformersGenerator)
        for args in (CPU, other)
    }
    assert len(fingerprints) == 2
