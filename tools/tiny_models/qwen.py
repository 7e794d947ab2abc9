"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from .recipe import CHATML, Recipe
from .tokenizer import train_tokenizer

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
    return train_tokenizer(
        _SPECIAL_TOKENS,
        named_tokens={},
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
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


def _text_config(tokenizer: PreTrainedTokenizerFast, **overrides: object) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    } | overrides


def qwen2_vl() -> Recipe:
    """Return the demo's model: 4.6 million parameters, of which 2.6 million see the image.

    Attention over the patches makes an encode dear (its cost grows with the square of the pixels)
    while the text side stays cheap, as in the real models.
    """
    tokenizer = _tokenizer()
    config = Qwen2VLConfig(
        text_config=_text_config(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 9, 9]}
        ),
        vision_config={"depth": 6, "embed_dim": 160, "num_heads": 4, "hidden_size": 192, "mlp_ratio": 4},
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 1024 * 1024,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return Recipe(config, tokenizer, image_processor)
