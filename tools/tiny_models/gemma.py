"""Tiny Gemma 3."""

from __future__ import annotations

from transformers import Gemma3Config

from .recipe import Recipe, chat_template, siglip_or_clip, text_config
from .tokenizer import byte_level, complete


def gemma3() -> Recipe:
    """Return Gemma 3: four tokens an image, image tokens that see each other, short sliding windows.

    The expansion of an image begins and ends with two newlines, and the tokenizer joins them with
    newlines of the text around, as Gemma's own does.
    """
    tokenizer = complete(
        byte_level(merge_newlines=True),
        (
            "<pad>",
            "<eos>",
            "<bos>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        named_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat_template="{{ bos_token }}"
        + chat_template(
            "<start_of_turn>", "\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n"
        ),
        bos="<bos>",
        eos="<end_of_turn>",
        pad="<pad>",
    )
    config = Gemma3Config(
        text_config=text_config(
            tokenizer,
            head_dim=16,
            query_pre_attn_scalar=16,
            num_hidden_layers=3,
            sliding_window=32,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        vision_config=siglip_or_clip("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    image_processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 56, "width": 56},
    }
    return Recipe(config, tokenizer, image_processor, {"image_seq_length": 4})
