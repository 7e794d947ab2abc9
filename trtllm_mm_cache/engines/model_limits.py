"""What a model's files say of its prompts and answers, without its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from trtllm_mm_cache.errors import ConfigurationError


def context_and_ends(model_path: Path) -> tuple[int, list[int]]:
    """Return how many tokens the model's context holds, and the tokens that end an answer.

    Blocking. Raises `ConfigurationError` where the files do not say.
    """
    try:
        # By the configuration's class: files leave out what is its default.
        config = AutoConfig.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise ConfigurationError(f"the model's config.json cannot be used: {line}") from error
    try:
        generation = GenerationConfig.from_pretrained(model_path, local_files_only=True)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise ConfigurationError("the model's config.json does not say how many tokens its context holds")
    ends = generation.eos_token_id
    return context, [ends] if isinstance(ends, int) else list(ends or ())
