"""Which LoRA adapters a PD worker on vLLM takes at its start: needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.registry import find_engine
from trtllm_mm_cache.engines.vllm.adapters import check_adapters
from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
from trtllm_mm_cache.errors import ConfigurationError

OF_THE_LANGUAGE_MODEL = (
    "base_model.model.model.layers.0.self_attn.q_proj",
    "base_model.model.model.language_model.layers.0.mlp.down_proj",
    "base_model.model.language_model.model.layers.3.self_attn.v_proj",
    "base_model.model.model.text_model.layers.0.self_attn.k_proj",
    "base_model.model.lm_head",
    "model.language_model.layers.0.mlp.up_proj",
)
OF_WHAT_MAKES_EMBEDDINGS = (
    "base_model.model.visual.blocks.0.attn.qkv",
    "base_model.model.model.visual.merger.mlp.0",
    "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    "base_model.model.vision_tower.encoder.layer.0.attention.q_proj",
    "base_model.model.model.multi_modal_projector.linear_1",
    "base_model.model.model.connector.modality_projection.proj",
    "base_model.model.model.vision_model.encoder.layers.0.self_attn.q_proj",
    "base_model.model.mlp1.1",
)


def folder(root: Path, *modules: str, config: Any = None) -> Path:
    """Write an adapter of these modules."""
    made = root / "adapter"
    made.mkdir()
    tensor = np.zeros((2, 2), dtype=np.float32)
    save_file(
        {f"{each}.lora_{half}.weight": tensor for each in modules for half in "AB"},
        made / "adapter_model.safetensors",
    )
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | (config or {})))
    return made


def test_adapters_of_the_language_model_are_taken(tmp_path: Path) -> None:
    check_adapters({"a": folder(tmp_path, *OF_THE_LANGUAGE_MODEL)}, None)
    check_adapters({}, None)


@pytest.mark.parametrize("module", OF_WHAT_MAKES_EMBEDDINGS)
def test_one_that_changes_tower_or_projector_is_refused_with_the_way_out(tmp_path: Path, module: str) -> None:
    adapter = folder(tmp_path, OF_THE_LANGUAGE_MODEL[0], module)
    with pytest.raises(ConfigurationError, match=r"tower or projector.*merge it into a model") as caught:
        check_adapters({"a": adapter}, None)
    assert module in str(caught.value)


@pytest.mark.parametrize(
    ("config", "most", "says"),
    [
        ({"r": 17}, None, r"rank 17, above max_lora_rank \(16\)"),
        ({"r": 8, "rank_pattern": {"q_proj": 64}}, 32, r"rank 64, above max_lora_rank \(32\)"),
        ({"r": 0}, None, "r must be a whole number"),
        ({"r": None}, None, "r must be a whole number"),
        ({"rank_pattern": [5]}, None, "r must be a whole number"),
        ({"peft_type": "PREFIX_TUNING"}, None, "is no LoRA adapter"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: Any, most: int | None, says: str) -> None:
    adapter = folder(tmp_path, OF_THE_LANGUAGE_MODEL[0], config=config)
    with pytest.raises(ConfigurationError, match=says):
        check_adapters({"a": adapter}, most)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    adapter = folder(tmp_path, OF_THE_LANGUAGE_MODEL[0])
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    with pytest.raises(ConfigurationError, match=r"'a' in .*missing has no readable adapter_config\.json"):
        check_adapters({"a": tmp_path / "missing"}, None)
    save_file({}, weights)
    with pytest.raises(ConfigurationError, match="has no weights"):
        check_adapters({"a": adapter}, None)
    weights.write_bytes(b"no safetensors")
    with pytest.raises(ConfigurationError, match=r"no readable adapter_model\.safetensors"):
        check_adapters({"a": adapter}, None)
    weights.unlink()
    with pytest.raises(ConfigurationError, match=r"no readable adapter_model\.safetensors"):
        check_adapters({"a": adapter}, None)
    for text in ("no json", "[]"):
        config.write_text(text)
        with pytest.raises(ConfigurationError, match="'a'"):
            check_adapters({"a": adapter}, None)


def test_they_are_checked_before_anything_is_started(tmp_path: Path) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text(f"lora_modules: {{cats: {tmp_path}}}\n")
    with pytest.raises(ConfigurationError, match="'cats'"):
        find_engine("vllm").check("pd", {"model_type": "qwen2_vl"}, file)


@pytest.mark.parametrize("name", ["", " cats", "cats dogs", "/cats", "cats\\n", "ca\u200bts", "c" * 300])
def test_names_that_no_client_could_give(tmp_path: Path, name: str) -> None:
    file = tmp_path / "pd.yaml"
    file.write_text(json.dumps({"lora_modules": {name: str(tmp_path)}}))
    with pytest.raises(ConfigurationError, match="lora_modules"):
        load_engine_args(file, VllmEngineArgs)


def test_what_vllm_is_told(tmp_path: Path) -> None:
    """Of the adapters themselves nothing: they are loaded one by one when it runs."""
    given = VllmEngineArgs(lora_modules={"a": tmp_path, "org/b-1.5": tmp_path}, max_lora_rank=64).given()
    assert given == {"enable_lora": True, "max_cpu_loras": 3, "max_lora_rank": 64}
    assert VllmEngineArgs(lora_modules={"a": tmp_path}, max_loras=4).given()["max_cpu_loras"] == 4
    assert VllmEngineArgs(lora_modules={}).given() == {}
