"""The production engine: TensorRT-LLM. Imports nothing of `tensorrt_llm` until an engine is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.trtllm.encoder import TrtllmVisionEncoder
from trtllm_mm_cache.engines.trtllm.generator import TrtllmGenerator
from trtllm_mm_cache.engines.trtllm.layout import embedding_dtype_name
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.engines.trtllm.support import architecture_of
from trtllm_mm_cache.errors import ConfigurationError

__all__ = [
    "TrtllmEncoderArgs",
    "TrtllmGenerator",
    "TrtllmLlmArgs",
    "TrtllmVisionEncoder",
    "embedding_dtype",
    "follow",
    "load_generator",
    "load_vision_encoder",
]


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TrtllmVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    return TrtllmVisionEncoder(model_path, load_engine_args(args_file, TrtllmEncoderArgs))


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings with the settings in `args_file`. See `engines.registry`."""
    architecture_of(model_path)
    dtype = load_engine_args(args_file, TrtllmEncoderArgs).dtype
    config = json.loads((model_path / "config.json").read_bytes())
    text = config.get("text_config", {})
    return embedding_dtype_name(SimpleNamespace(**config | {"text_config": SimpleNamespace(**text)}), dtype)


def load_generator(model_path: Path, args_file: Path | None) -> TrtllmGenerator:
    """Load the language half with the settings in `args_file`. See `engines.registry`."""
    return TrtllmGenerator(model_path, load_engine_args(args_file, TrtllmLlmArgs))


def follow(args_file: Path | None) -> None:
    """Raise `ConfigurationError`: TensorRT-LLM's launcher keeps every rank but the first to itself."""
    del args_file
    raise ConfigurationError(
        "TensorRT-LLM's ranks are started by its own launcher: "
        "mpirun -n N trtllm-llmapi-launch trtllm-mm-cache pd ..."
    )
