"""The demo model's architecture and directory: Qwen2-VL at 3 million parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

PATCH = 14
MERGE = 2
IMAGE_PROCESSOR: Mapping[str, Any] = {
    "processor_class": "Qwen2VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    # Other pictures are scaled to what the model was trained on: 56 x 56 to 84 x 84 pixels.
    "size": {"shortest_edge": 4 * (PATCH * MERGE) ** 2, "longest_edge": 9 * (PATCH * MERGE) ** 2},
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Return the architecture for `tokenizer`.

    mRoPE gives the width the lowest frequencies. With a `rope_theta` of 1e6 and sections of about equal
    size, neighbouring columns of a picture would differ by less than 0.001 radian at this head size, too
    little to tell left from right by. Here rows turn by 0.4 and 0.6 radian and columns by up to 0.3, and most
    of the width's dimensions hardly turn, so that words can be compared over any distance. This follows
    from the formula; trained models were not compared, except that a theta of 10 did no better.
    """
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [1, 2, 13]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "embed_dim": 160,
            "num_heads": 4,
            "hidden_size": 128,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def new_model(config: Qwen2VLConfig, seed: int) -> Qwen2VLForConditionalGeneration:
    """Return an untrained model in float32 whose weights follow from `seed`.

    Matrices keep the variance of what they multiply; those that write into the residual stream start
    smaller.
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float()
    residual = ("attn.proj.weight", "fc2.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            deviation = 0.09 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=deviation * (0.35 if name.endswith(residual) else 1.0))
    with torch.no_grad():
        # Image tokens as long as words: the decoder's layers could hardly change much longer ones.
        model.model.visual.merger.mlp[-1].weight *= 0.1
        for layer in model.model.language_model.layers:
            _look_for_likeness(layer.self_attn)
    return model


def _look_for_likeness(attention: nn.Module) -> None:
    """Let every token first attend to what is like it, and take over what it finds.

    Answering is finding the question's words in the picture ("mimetic initialization" in the literature).
    """
    attention.q_proj.weight *= 0.7
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.o_proj.weight.copy_(0.35 * attention.v_proj.weight.T)


def save_model(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Write a directory that transformers and Dynamo's frontend load; weights as float16.

    `model` stays as it is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored = Qwen2VLForConditionalGeneration(model.config).to(torch.float16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    stored.save_pretrained(directory)
    # Dynamo's frontend reads the chat template from tokenizer_config.json.
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    _write_json(directory / "preprocessor_config.json", IMAGE_PROCESSOR)
    _write_json(directory / "processor_config.json", {"processor_class": "Qwen2VLProcessor"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
