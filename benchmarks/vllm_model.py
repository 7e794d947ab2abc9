"""A random model for `vllm.py` whose embeddings have the size of real ones: Qwen3-VL, 10,240 columns.

2,560 hidden units and three deepstack levels, bfloat16: 20 kB a row, and 1, 10 and 35 MB for images of 49,
506 and 1,722 rows. Tower and decoder have few layers: what an encode costs here says nothing of a real tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.tiny_models import ARCHITECTURES, write_model

HIDDEN = 2560
LEVELS = 3
SIDE = 32
"""An image has a row for each square of so many pixels."""

MOST_PIXELS = 2048 * 2048


def write_wide_model(folder: Path, *, hidden: int = HIDDEN) -> Path:
    """Write the model into `folder` and return it."""
    recipe = ARCHITECTURES["qwen3_vl"]()
    text: Any = recipe.config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 1024, 4
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 32
    text.rope_parameters["mrope_section"] = [6, 5, 5]
    vision: Any = recipe.config.vision_config
    vision.depth, vision.hidden_size, vision.num_heads, vision.out_hidden_size = 4, 256, 4, hidden
    vision.intermediate_size, vision.deepstack_visual_indexes = 512, [0, 1, 2]
    recipe.image_processor["size"]["longest_edge"] = MOST_PIXELS  # type: ignore[index]
    return write_model(recipe, "qwen3_vl", folder)
