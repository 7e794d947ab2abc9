"""Tiny LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedTokenizerFast

from .recipe import Recipe, chat_template, chatml, siglip_or_clip, text_config
from .tokenizer import byte_level, complete, sentencepiece

_PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
_CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}


def _tokenizer(template: str, *, spaces: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer in Llama's manner: a beginning-of-sequence token before every text."""
    return complete(
        sentencepiece(space_before_every_text=spaces),
        ("<unk>", "<s>", "</s>", "<image>", "<pad>"),
        named_tokens={"image_token": "<image>"},
        chat_template=template,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
    )


def llava() -> Recipe:
    """Return LLaVA-1.5 with a CLIP tower, of which the last layer but one is used, without class token."""
    tokenizer = _tokenizer(chat_template("", ": ", "<image>\n", " ", "ASSISTANT:"), spaces=True)
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config=siglip_or_clip("clip_vision_model", projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return Recipe(config, tokenizer, {"image_processor_type": "CLIPImageProcessor", **_CROP}, processor)


def llava_next() -> Recipe:
    """Return LLaVA-1.6 on Mistral: an image becomes a thumbnail and up to four tiles."""
    tokenizer = _tokenizer(chat_template("[", "] ", "<image>\n", " ", "[/INST]"), spaces=False)
    config = LlavaNextConfig(
        text_config={"model_type": "mistral", "sliding_window": None, **text_config(tokenizer)},
        vision_config=siglip_or_clip("clip_vision_model", projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": _PINPOINTS,
        **_CROP,
    }
    processor = {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return Recipe(config, tokenizer, image_processor, processor)


def llava_onevision() -> Recipe:
    """Return LLaVA-OneVision: tiles for a lone image, scaled down where they exceed two tiles' rows."""
    tokenizer = complete(
        byte_level(),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        named_tokens={"image_token": "<image>", "video_token": "<video>"},
        chat_template=chatml("<image>\n"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config=siglip_or_clip("siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    image_processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": _PINPOINTS,
        "size": {"height": 56, "width": 56},
    }
    processor = {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    }
    return Recipe(config, tokenizer, image_processor, processor)
