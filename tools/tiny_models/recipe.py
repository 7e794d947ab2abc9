"""What one architecture contributes to a tiny model directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Recipe:
    """Everything of a model directory except the weights, which follow from `config` and the seed.

    `image_processor` holds preprocessor_config.json, `processor` the arguments of the model's
    processor class in processor_config.json.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerFast
    image_processor: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)


def chat_template(before_role: str, after_role: str, placeholder: str, end: str, generation: str) -> str:
    """Return a template for messages whose content is a string or a list of text and image parts.

    `before_role` and `after_role` stand around the role's name, `placeholder` once for each image,
    `end` after each message, and `generation` opens the answer.
    """
    return (
        "{% for message in messages %}"
        f"{{{{ {before_role!r} + message['role'] + {after_role!r} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] in ('image', 'image_url') %}}{{{{ {placeholder!r} }}}}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{{{{ {end!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {generation!r} }}}}{{% endif %}}"
    )


def chatml(placeholder: str) -> str:
    """Return the ChatML template that Qwen's family and InternVL use."""
    return chat_template("<|im_start|>", "\n", placeholder, "<|im_end|>\n", "<|im_start|>assistant\n")


def text_config(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> dict[str, Any]:
    """Return a decoder of 64 hidden units and 2 layers, heads of 16, two of them to a key and value."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | overrides


def siglip_or_clip(model_type: str, **overrides: Any) -> dict[str, Any]:
    """Return a vision tower for images of 56 x 56 pixels: 4 x 4 patches of 14."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    } | overrides
