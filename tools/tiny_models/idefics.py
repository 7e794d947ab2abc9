"""Tiny Idefics3 and SmolVLM: an image is split into tiles marked by row and column tokens."""

from __future__ import annotations

from typing import Any

from transformers import Idefics3Config, PreTrainedTokenizerFast, SmolVLMConfig

from .recipe import Recipe, chat_template, siglip_or_clip, text_config
from .tokenizer import byte_level, complete

_PROCESSOR = {"image_seq_len": 4}


def _tokenizer() -> PreTrainedTokenizerFast:
    positions = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return complete(
        byte_level(),
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<end_of_utterance>",
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            *positions,
        ),
        named_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        chat_template=chat_template("<|im_start|>", ": ", "<image>", "<end_of_utterance>\n", "Assistant:"),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|endoftext|>",
    )


def _settings(tokenizer: PreTrainedTokenizerFast, vision_type: str) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **text_config(tokenizer)},
        "vision_config": siglip_or_clip(vision_type),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
    }


def _image_processor(kind: str) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "size": {"longest_edge": 168},
        "max_image_size": {"longest_edge": 56},
        "do_image_splitting": True,
    }


def idefics3() -> Recipe:
    """Return Idefics3 with up to nine tiles and the whole image, four tokens each."""
    tokenizer = _tokenizer()
    config = Idefics3Config(**_settings(tokenizer, "idefics3_vision"))
    return Recipe(config, tokenizer, _image_processor("Idefics3ImageProcessor"), _PROCESSOR)


def smolvlm() -> Recipe:
    """Return SmolVLM with up to nine tiles and the whole image, four tokens each."""
    tokenizer = _tokenizer()
    config = SmolVLMConfig(**_settings(tokenizer, "smolvlm_vision"))
    return Recipe(config, tokenizer, _image_processor("SmolVLMImageProcessor"), _PROCESSOR)
