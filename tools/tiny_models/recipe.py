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


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}IMAGE"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with content parts; IMAGE stands for the family's placeholder."""
