"""Which models and which release of SGLang this engine serves, and what SGLang is started with.

What each architecture needs was run in SGLang 0.5.23 on the CPU: docs/sglang.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trtllm_mm_cache.engines.grammar import WHITESPACE
from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

RELEASE = "0.5.23"
"""The release that this engine was written against and run on: what it relies on is no public interface."""

OWN: Final = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
"""Architectures (`model_type`) of SGLang's own whose answers were compared with its own, from pixels."""

LANGUAGE_PART: Final = ("idefics3", "internvl", "llava", "llava_next", "llava_onevision")
"""Architectures that SGLang has no class for, so that it runs their language models alone (`external`)."""

SERVED: Final = tuple(sorted(OWN + LANGUAGE_PART))

_REASONS: Final[Mapping[str, str]] = {
    "gemma3": "the tokens of an image see each other, which SGLang computes with its Triton attention alone",
    "smolvlm": "its tower does not run in the transformers that SGLang wants, so it was not compared",
}
_EXTERNAL = "trtllm_mm_cache.engines.sglang.external"

_ENVIRONMENT: Final[Mapping[str, str]] = {
    # How a request reaches the scheduler: msgpack would know no tensor that is handed over by its place.
    "SGLANG_USE_PICKLE_IPC": "1",
    # Log probabilities are the model's own, before temperature.
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
}
_DEFAULTS: Final[Mapping[str, str]] = {
    # A model's code and weights are local: nothing is asked for over the network.
    "HF_HUB_OFFLINE": "1",
    # SGLang would replace this process's handlers of the log. This changes two levels and nothing else; what
    # its own processes log is on their standard error.
    "SGLANG_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("logging.json")),
}
_ON_CPU: Final[Mapping[str, Any]] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mm_attention_backend": "sdpa",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
}


def check_architecture(model_type: str) -> None:
    """Raise `ConfigurationError` with the reason when a config.json's `model_type` is not served."""
    if model_type in SERVED:
        return
    reason = _REASONS.get(model_type, "its answers from embeddings were not compared with SGLang's own")
    raise ConfigurationError(
        f"the sglang engine does not serve the architecture {model_type!r}: {reason}; it serves "
        f"{', '.join(SERVED)}; the transformers engine serves more (--engine transformers)"
    )


def prepare_environment(device: str) -> None:
    """Set what SGLang reads from the environment; before it is imported. The operator's own stays."""
    os.environ.update(_ENVIRONMENT)
    if device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def device_of(args: SglangEngineArgs) -> str:
    """Return where SGLang computes."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def import_sglang(device: str | None = None) -> Any:
    """Import SGLang (seconds to half a minute); warn when it is another release than `RELEASE`.

    Returns the module of its `Engine`. The event loop's policy, which SGLang would set for the whole process,
    stays as it was. Raises `ConfigurationError` when it is not installed or does not load.
    """
    prepare_environment(device or device_of(SglangEngineArgs()))
    policy = asyncio.get_event_loop_policy()
    try:
        import sglang
        from sglang.srt.entrypoints import engine
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigurationError(
            f"engine 'sglang' needs the Python package sglang, which cannot be imported ({error}); make an "
            "environment with launch/setup_venv.sh FOLDER sglang, or use --engine transformers"
        ) from error
    finally:
        asyncio.set_event_loop_policy(policy)
    if sglang.__version__ != RELEASE:
        logger.warning(
            "SGLang %s is not the release this engine was written for (%s): embeddings reach it by parts "
            "that are not its public interface",
            sglang.__version__,
            RELEASE,
        )
    return engine


def run_language_part_alone() -> None:
    """Have SGLang know the models of `external`, in this process and those that it starts."""
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = _EXTERNAL
    os.environ["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = _EXTERNAL
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.register(_EXTERNAL, overwrite=True, strict=True)


def engine_arguments(model_path: Path, args: SglangEngineArgs) -> dict[str, Any]:
    """Return the keyword arguments of `ServerArgs`: what was given, and what must hold.

    See `settings.FORCED` for the reasons.
    """
    device = device_of(args)
    arguments = {**(_ON_CPU if device == "cpu" else {}), **args.given()}
    return arguments | {
        "device": device,
        "model_path": str(model_path),
        "dtype": args.resolved_dtype(model_path),
        "enable_multimodal": True,
        "tokenizer_worker_num": 1,
        "incremental_streaming_output": True,
        "stream_interval": 1,
        "grammar_backend": "llguidance",
        "constrained_json_whitespace_pattern": WHITESPACE,
        "sampling_defaults": "openai",
        "model_impl": "sglang",
        "skip_server_warmup": True,
        "json_model_override_args": json.dumps(_overrides(model_path)),
        "log_level": "warning",
    }


def _overrides(model_path: Path) -> dict[str, Any]:
    """Return what SGLang reads of a configuration under another name than transformers 5 writes."""
    try:
        config = json.loads((model_path / "config.json").read_bytes())
        vision = config["vision_config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError("the model directory has no config.json with a vision_config") from error
    if "in_channels" in vision and "in_chans" not in vision:
        return {"vision_config": vision | {"in_chans": vision["in_channels"]}}
    return {}
