"""Tiny models that vLLM can run on a CPU: its attention there takes heads of 32 and more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tools.tiny_models import ARCHITECTURES, write_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "shapes-qwen2-vl"
CARD = ROOT / "models" / "card.png"

TINY = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "internvl", "idefics3")
"""The architectures that vLLM serves here, beside the demo model's."""


def make_model(architecture: str, root: Path) -> Path:
    """Write a tiny model with two heads of 32, and return its directory."""
    recipe = ARCHITECTURES[architecture]()
    text: Any = recipe.config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    rope = text.rope_parameters
    if "mrope_section" in rope:
        rope["mrope_section"] = [6, 5, 5]
    directory = write_model(recipe, architecture, root / architecture)
    if architecture.startswith("llava"):
        _as_published(directory / "model.safetensors")
    return directory


def _as_published(weights: Path) -> None:
    """Name the tower's weights as published checkpoints do; transformers 5 writes them otherwise."""
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if "vision_tower." in name and "vision_model" not in name
        else name: tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(named, weights, metadata={"format": "pt"})
