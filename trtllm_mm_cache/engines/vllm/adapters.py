"""LoRA adapters: folders that the operator names in `pd.yaml`, checked before vLLM is started.

All adapters share the cache's embeddings with the base model, which is right as long as none of them changes
what makes an embedding: vision tower and projector. vLLM 0.32 loads an adapter's weights for these without a
word and does not apply them (`enable_tower_connector_lora` is off), so its answers would be no adapter's that
was ever trained. Such an adapter is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from trtllm_mm_cache.errors import ConfigurationError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

DEFAULT_RANK: Final = 16
"""vLLM's `max_lora_rank`, where it is not set."""

_OF_LANGUAGE_MODEL: Final = re.compile(
    r"(base_model\.model\.)?(model\.)*(language_model|text_model|layers|norm|embed_tokens|lm_head)\."
)
"""How the names of weights begin that are not the vision tower's: in PEFT's form, as the releases of
transformers name the parts of the served architectures."""


def check_adapters(adapters: Mapping[str, Path], max_rank: int | None) -> None:
    """Raise `ConfigurationError` for the first adapter that cannot be served, with reason and way out."""
    most = max_rank or DEFAULT_RANK
    for name, folder in adapters.items():
        where = f"lora_modules: the adapter {name!r} in {folder}"
        for rank in _ranks(_config(folder, where), where):
            if rank > most:
                raise ConfigurationError(
                    f"{where} has rank {rank}, above max_lora_rank ({most}): set that higher"
                )
        foreign = next((each for each in _weights(folder, where) if not _OF_LANGUAGE_MODEL.match(each)), None)
        if foreign is not None:
            raise ConfigurationError(
                f"{where} has weights outside the language model ({foreign}). One that changes vision tower "
                "or projector is not served, for all adapters share the embeddings of one tower: train it "
                "for the language model alone, or merge it into a model of its own and serve that"
            )


def _config(folder: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{where} has no readable {CONFIG}: name a folder as PEFT saves it"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ConfigurationError(f"{where} is no LoRA adapter by its {CONFIG}: only such are served")
    return config


def _ranks(config: Mapping[str, Any], where: str) -> Iterator[int]:
    patterns = config.get("rank_pattern") or {}
    for rank in (config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])):
        if type(rank) is not int or rank < 1:
            raise ConfigurationError(f"{where} has no rank in its {CONFIG}: r must be a whole number")
        yield rank


def _weights(folder: Path, where: str) -> list[str]:
    """Return the names of the adapter's weights; their values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"{where} has no readable {WEIGHTS}: save it in that form (other forms are not read)"
        ) from error
    if not names:
        raise ConfigurationError(f"{where} has no weights in its {WEIGHTS}")
    return names
