"""Equal models have equal fingerprints; whatever can change an embedding changes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.conftest import ModelFactory
from trtllm_mm_cache.engines.fingerprint import model_fingerprint, weight_files
from trtllm_mm_cache.errors import ConfigurationError


def fingerprint(model_dir: Path, engine: str = "engine 1", embedding_dtype: str = "float32") -> str:
    return model_fingerprint(model_dir, engine=engine, embedding_dtype=embedding_dtype)


@pytest.fixture
def copy(model_of: ModelFactory, tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    return Path(shutil.copytree(model_of("llava"), tmp_path / "elsewhere"))


def test_the_place_of_a_model_does_not_count(model_of: ModelFactory, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(model_of("llava"))
    assert len(bytes.fromhex(fingerprint(copy))) == 32


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_every_configuration_file_counts(copy: Path, name: str) -> None:
    before = fingerprint(copy)
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"one": "more"}))
    changed = fingerprint(copy)
    assert changed != before
    if name != "config.json":
        path.unlink()
        assert fingerprint(copy) not in {before, changed}


def test_engine_and_stored_dtype_count(copy: Path) -> None:
    variants = {
        fingerprint(copy),
        fingerprint(copy, engine="engine 2"),
        fingerprint(copy, embedding_dtype="bfloat16"),
    }
    assert len(variants) == 3


def test_one_bit_of_the_weights_counts(copy: Path) -> None:
    before = fingerprint(copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(copy) != before


def test_other_files_do_not_count(copy: Path) -> None:
    before = fingerprint(copy)
    (copy / "README.md").write_text("about the model")
    (copy / "generation_config.json").unlink()
    assert fingerprint(copy) == before


def test_content_does_not_move_between_files(copy: Path) -> None:
    """A file's content under another name is another model."""
    before = fingerprint(copy)
    (copy / "special_tokens_map.json").write_bytes(b"{}")
    as_map = fingerprint(copy)
    (copy / "special_tokens_map.json").rename(copy / "added_tokens.json")
    assert len({before, as_map, fingerprint(copy)}) == 3


def shard(model_dir: Path) -> list[Path]:
    """Split the weights into two shards with an index, as large models have them."""
    weights = load_file(model_dir / "model.safetensors")
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, model_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sorted(model_dir.glob("*.safetensors"))


def test_shards_are_those_of_the_index(copy: Path) -> None:
    shards = shard(copy)
    before = fingerprint(copy)
    save_file({"unused": torch.zeros(1)}, copy / "another.safetensors")
    assert weight_files(copy) == shards
    assert fingerprint(copy) == before
    shards[0].unlink()
    with pytest.raises(ConfigurationError, match="model-00001-of-00002"):
        fingerprint(copy)


def test_torch_weights_are_taken_where_there_is_nothing_else(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    assert weight_files(copy) == [copy / "model.safetensors"]
    (copy / "model.safetensors").unlink()
    assert weight_files(copy) == [copy / "pytorch_model.bin"]


def test_a_directory_that_is_no_model(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        fingerprint(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no weights"):
        fingerprint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        fingerprint(copy)
