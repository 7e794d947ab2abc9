"""Tiny models that SGLang can run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.tiny_models import ARCHITECTURES, write_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "shapes-qwen2-vl"
CARD = ROOT / "models" / "card.png"

LANGUAGE_PART = ("llava", "llava_next", "llava_onevision", "internvl", "idefics3")
"""Architectures of which SGLang runs the language model alone."""

TINY = ("qwen2_5_vl", "qwen3_vl", *LANGUAGE_PART)
"""The architectures that SGLang serves here, beside the demo model's."""


def make_model(architecture: str, root: Path) -> Path:
    """Write a tiny model with two heads of 32, and return its directory."""
    recipe = ARCHITECTURES[architecture]()
    text: Any = recipe.config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [6, 5, 5]
    return write_model(recipe, architecture, root / architecture)
