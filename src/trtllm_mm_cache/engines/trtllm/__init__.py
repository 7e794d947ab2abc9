"""The production engine: TensorRT-LLM. Imports nothing of `tensorrt_llm` until an engine is loaded."""

from __future__ import annotations

from pathlib import Path

from trtllm_mm_cache.config import load_engine_args
from trtllm_mm_cache.engines.trtllm.encoder import TrtllmVisionEncoder
from trtllm_mm_cache.engines.trtllm.generator import TrtllmGenerator
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.errors import ConfigurationError

__all__ = [
    "TrtllmEncoderArgs",
    "TrtllmGenerator",
    "TrtllmLlmArgs",
    "TrtllmVisionEncoder",
    "follow",
    "load_generator",
    "load_vision_encoder",
]


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TrtllmVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    return TrtllmVisionEncoder(model_path, load_engine_args(args_file, TrtllmEncoderArgs))


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
