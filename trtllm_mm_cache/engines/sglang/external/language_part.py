"""Models of which SGLang runs the language model alone, for it has no class for them. Imports SGLang.

It would fall back on transformers' own class, which takes pixels and no embeddings. Here a model is one of
SGLang's language models below the rows that a request brings. The vision tower is not loaded.

The names of these classes are those in `architectures` of the models' config.json, by which SGLang finds them
(`models/registry.py`, 0.5.23), in every process that imports its registry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils import add_prefix
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# As transformers 5 writes weights' names, and as published checkpoints have them.
_LANGUAGE = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head)(.+)")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")


class LanguagePart(nn.Module):
    """SGLang's language model for a config's `text_config`. Weights of anything else are left out."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        text = config.get_text_config()
        # transformers goes by the whole model's.
        text.tie_word_embeddings = config.tie_word_embeddings
        language_class, _ = ModelRegistry.resolve_model_cls(
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]
        )
        self.language_model = language_class(text, quant_config, add_prefix("language_model", prefix))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **others: Any
    ) -> Any:
        """Put the rows in the places of their tokens and run the language model."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: _no_tower},
            positions=positions,
            **others,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """See SGLang's models."""
        return self.language_model.load_weights(_of_language(weights))


def _of_language(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        if found := _HEAD.fullmatch(name):
            yield found[1], tensor
        elif found := _LANGUAGE.fullmatch(name):
            yield f"model.{found[1]}", tensor


def _no_tower(items: Any) -> NoReturn:
    raise NotImplementedError(f"{len(items)} images came as pixels: this model is loaded without its tower")


class LlavaForConditionalGeneration(LanguagePart):
    """LLaVA 1.5, stored as transformers does."""


class LlavaNextForConditionalGeneration(LanguagePart):
    """LLaVA 1.6."""


class LlavaOnevisionForConditionalGeneration(LanguagePart):
    """LLaVA-OneVision."""


class InternVLForConditionalGeneration(LanguagePart):
    """InternVL, stored as transformers does."""


class Idefics3ForConditionalGeneration(LanguagePart):
    """Idefics3."""


EntryClass = [
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    InternVLForConditionalGeneration,
    Idefics3ForConditionalGeneration,
]


class NoProcessor(BaseMultimodalProcessor):  # type: ignore[misc]
    """SGLang wants a processor for each model with images; prepared input needs none."""

    models = EntryClass

    async def process_mm_data_async(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raise: whatever comes here is not prepared."""
        raise NotImplementedError("prompts with images come prepared")
