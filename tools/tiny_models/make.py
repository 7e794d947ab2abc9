"""Write a tiny model directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from . import gemma, idefics, internvl, llava, qwen
from .recipe import Recipe
from .tokenizer import save_tokenizer
from .weights import fill_weights

ARCHITECTURES: Mapping[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        qwen.qwen2_vl,
        qwen.qwen2_5_vl,
        qwen.qwen3_vl,
        llava.llava,
        llava.llava_next,
        llava.llava_onevision,
        internvl.internvl,
        idefics.smolvlm,
        idefics.idefics3,
        gemma.gemma3,
    )
}
"""Hugging Face `model_type` to its recipe."""


def make_tiny_model(architecture: str, out_dir: Path | str, *, seed: int = 0) -> Path:
    """Write the model directory `out_dir` and return it; the same arguments give the same bytes.

    Existing files of a model are overwritten. Weights are stored as bfloat16, as released models
    are. Raises `KeyError` for an architecture that is not in `ARCHITECTURES`.
    """
    return write_model(ARCHITECTURES[architecture](), architecture, out_dir, seed=seed)


def write_model(recipe: Recipe, architecture: str, out_dir: Path | str, *, seed: int = 0) -> Path:
    """Write the model directory of a recipe, as `make_tiny_model` does, and return it."""
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(recipe.config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    model.tie_weights()
    fill_weights(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=recipe.tokenizer.bos_token_id,
        eos_token_id=recipe.tokenizer.eos_token_id,
        pad_token_id=recipe.tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    save_tokenizer(recipe.tokenizer, directory)
    processor = {"processor_class": PROCESSOR_MAPPING_NAMES[architecture]}
    _write_json(directory / "preprocessor_config.json", {**processor, **recipe.image_processor})
    _write_json(directory / "processor_config.json", {**processor, **recipe.processor})
    return directory


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
