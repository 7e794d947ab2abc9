"""A Qwen2.5-VL of the size asked for, random, made on the device in seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from tools.tiny_models import make_tiny_model
from tools.tiny_models.qwen import qwen2_5_vl
from tools.tiny_models.tokenizer import save_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "heads": (16, 2)},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "heads": (28, 4)},
}
"""The language halves of Qwen2.5-VL as released; its vision tower is the same in both, 0.67 billion."""

_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_LARGEST_ITEM = 16384  # rows
_VOCABULARY = 151_936


def make_model(folder: Path, size: str) -> dict[str, Any]:
    """Write the model directory `folder` unless it is there; return what it took."""
    if (folder / "config.json").exists():
        return {}
    began = time.perf_counter()
    if size == "tiny":
        make_tiny_model("qwen2_5_vl", folder)
        return {"model_s": round(time.perf_counter() - began, 1)}
    recipe = qwen2_5_vl()
    wanted = dict(SIZES[size])
    text = recipe.config.text_config
    text.num_attention_heads, text.num_key_value_heads = wanted.pop("heads")
    for name, value in wanted.items():
        setattr(text, name, value)
    text.vocab_size, text.max_position_embeddings = _VOCABULARY, 128_000
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    for name, value in (_TOWER | {"out_hidden_size": text.hidden_size}).items():
        setattr(recipe.config.vision_config, name, value)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(recipe.config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=recipe.tokenizer.eos_token_id)
    model.save_pretrained(folder, max_shard_size="4GB")
    save_tokenizer(recipe.tokenizer, folder)
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    pixels = {"size": {"shortest_edge": 4 * 784, "longest_edge": _LARGEST_ITEM * 784}}
    image = {**processor, **recipe.image_processor, **pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "processor_config.json").write_text(json.dumps({**processor, **recipe.processor}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model_s": round(time.perf_counter() - began, 1), "parameters": parameters}
