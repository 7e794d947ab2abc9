"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from .recipe import Recipe, chatml, text_config
from .tokenizer import byte_level, complete

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _tokenizer() -> PreTrainedTokenizerFast:
    return complete(
        byte_level(),
        _SPECIAL_TOKENS,
        named_tokens={},
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _image_processor(patch: int, smallest: int, largest: int) -> dict[str, Any]:
    """Return preprocessor_config.json for images of `smallest` to `largest` merged patches."""
    pixels = (2 * patch) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": smallest * pixels, "longest_edge": largest * pixels},
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def qwen2_vl() -> Recipe:
    """Return the demo's model: 4.4 million parameters, of which 2.6 million see the image.

    Attention over the patches makes an encode dear (its cost grows with the square of the pixels)
    while the text side stays cheap, as in the real models.
    """
    tokenizer = _tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 9, 9]}
    text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "rope_parameters": rope}
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer, **text, max_position_embeddings=8192),
        vision_config={"depth": 6, "embed_dim": 160, "num_heads": 4, "hidden_size": 192, "mlp_ratio": 4},
        **_token_ids(tokenizer),
    )
    return Recipe(config, tokenizer, _image_processor(14, smallest=4, largest=1337))


def qwen2_5_vl() -> Recipe:
    """Return a model whose tower attends within windows in one block and to everything in the other."""
    tokenizer = _tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **_token_ids(tokenizer),
    )
    return Recipe(config, tokenizer, _image_processor(14, smallest=4, largest=64))


def qwen3_vl() -> Recipe:
    """Return a model with two deepstack levels, interleaved positions and tied word embeddings."""
    tokenizer = _tokenizer()
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, head_dim=16, num_hidden_layers=3, rope_parameters=rope),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **_token_ids(tokenizer),
    )
    return Recipe(config, tokenizer, _image_processor(16, smallest=4, largest=64))
