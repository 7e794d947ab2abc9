"""The production engine: TensorRT-LLM. Imports nothing of `tensorrt_llm` until an engine is loaded.

What needs torch is imported on its first use: `check` is asked before anything starts.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.engines.trtllm.support import architecture, architecture_of
from trtllm_mm_cache.errors import ConfigurationError

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.trtllm.encoder import TrtllmVisionEncoder
    from trtllm_mm_cache.engines.trtllm.generator import TrtllmGenerator

__all__ = [
    "TrtllmEncoderArgs",
    "TrtllmGenerator",
    "TrtllmLlmArgs",
    "TrtllmVisionEncoder",
    "check",
    "embedding_dtype",
    "follow",
    "import_all",
    "load_generator",
    "load_own_tower",
    "load_vision_encoder",
]


PACKAGE = "tensorrt_llm"
_HEAVY = {"TrtllmVisionEncoder": "encoder", "TrtllmGenerator": "generator"}
"""Names that this package exports, by the module that defines them."""


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)


def import_all() -> None:
    """Import torch and the adapter over it. See `engines.registry`."""
    for module in ("encoder", "generator"):
        importlib.import_module(f"{__name__}.{module}")


def check(half: Literal["encode", "pd"], config: Mapping[str, Any], args_file: Path | None) -> None:
    """Check YAML file and architecture. See `engines.registry`."""
    load_engine_args(args_file, TrtllmEncoderArgs if half == "encode" else TrtllmLlmArgs)
    if config:
        architecture(str(config.get("model_type")))


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TrtllmVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.trtllm.encoder import TrtllmVisionEncoder

    return TrtllmVisionEncoder(model_path, load_engine_args(args_file, TrtllmEncoderArgs))


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.trtllm.layout import embedding_dtype_name

    architecture_of(model_path)
    dtype = load_engine_args(args_file, TrtllmEncoderArgs).dtype
    config = json.loads((model_path / "config.json").read_bytes())
    text = config.get("text_config", {})
    return embedding_dtype_name(SimpleNamespace(**config | {"text_config": SimpleNamespace(**text)}), dtype)


def load_generator(model_path: Path, args_file: Path | None) -> TrtllmGenerator:
    """Load the language half with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.trtllm.generator import TrtllmGenerator

    return TrtllmGenerator(model_path, load_engine_args(args_file, TrtllmLlmArgs))


def load_own_tower(model_path: Path, args_file: Path | None, *, kept: bool) -> NoReturn:
    """Raise `ConfigurationError`: its vision tower runs in encode workers. See `engines.registry`."""
    del model_path, args_file, kept
    raise ConfigurationError(
        "TensorRT-LLM takes embeddings of encode workers only: leave out --disaggregation-mode agg, "
        "or use --engine vllm"
    )


def follow(args_file: Path | None) -> None:
    """Raise `ConfigurationError`: TensorRT-LLM's launcher keeps every rank but the first to itself."""
    del args_file
    raise ConfigurationError(
        "TensorRT-LLM's ranks are started by its own launcher: "
        "mpirun -n N trtllm-llmapi-launch trtllm-mm-cache pd ..."
    )
