"""Tiny InternVL."""

from __future__ import annotations

from transformers import InternVLConfig

from .recipe import Recipe, chatml, siglip_or_clip, text_config
from .tokenizer import byte_level, complete


def internvl() -> Recipe:
    """Return InternVL3: up to six tiles and a thumbnail, four tokens each, between two marker tokens."""
    tokenizer = complete(
        byte_level(),
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<img>",
            "</img>",
            "<IMG_CONTEXT>",
            "<video>",
        ),
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat_template=chatml("<IMG_CONTEXT>\n"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config=siglip_or_clip("internvl_vision"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    image_processor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 56, "width": 56},
        "min_patches": 1,
        "max_patches": 6,
    }
    return Recipe(config, tokenizer, image_processor, {"image_seq_length": 4})
