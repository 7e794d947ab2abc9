"""The library's tensor parallelism: which models have a plan, and how `from_pretrained` is asked for it."""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from trtllm_mm_cache.errors import ConfigurationError

_ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def check_divisible(config: PreTrainedConfig, ranks: int) -> None:
    """Raise `ConfigurationError` unless the model's language half can be spread over `ranks` ranks.

    Reads the configuration alone, so that nothing is loaded for an error.
    """
    text = config.get_text_config()
    if not text.base_model_tp_plan:
        raise ConfigurationError(
            f"transformers {transformers.__version__} has no tensor-parallel plan for the language model of "
            f"{config.model_type}: run it on one rank, or with the trtllm engine"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name)
        if heads % ranks:
            raise ConfigurationError(
                f"the model's {heads} heads ({name}) cannot be spread evenly over {ranks} ranks; "
                "choose a number of ranks that divides them"
            )


def parallel_arguments(ranks: int) -> dict[str, Any]:
    """Return what `from_pretrained` needs for a model spread over `ranks` ranks, two at least."""
    try:
        importlib.import_module("accelerate")  # transformers needs it for this, and says so in other words
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ConfigurationError(
            "several ranks need accelerate and a transformers with DistributedConfig: "
            "pip install --upgrade 'trtllm-mm-cache[transformers,mpi]'"
        ) from error
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def check_spread(model: PreTrainedModel) -> None:
    """Raise `ConfigurationError` when the library has loaded attention whole on every rank."""
    whole = [
        name
        for name, parameter in model.named_parameters()
        if name.endswith(_ATTENTION) and not isinstance(parameter, DTensor)
    ]
    if whole:
        raise ConfigurationError(
            f"transformers {transformers.__version__} did not spread {whole[0]} over the ranks: "
            "run the model on one rank, or with the trtllm engine"
        )
