"""The embedded default engine: Hugging Face transformers on the CPU or any torch device."""

from __future__ import annotations

from pathlib import Path

from trtllm_mm_cache.config import load_engine_args
from trtllm_mm_cache.engines.transformers.encoder import TransformersVisionEncoder
from trtllm_mm_cache.engines.transformers.generator import TransformersGenerator
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs

__all__ = [
    "TransformersEngineArgs",
    "TransformersGenerator",
    "TransformersVisionEncoder",
    "load_generator",
    "load_vision_encoder",
]


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TransformersVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    return TransformersVisionEncoder(model_path, load_engine_args(args_file, TransformersEngineArgs))


def load_generator(model_path: Path, args_file: Path | None) -> TransformersGenerator:
    """Load the language half with the settings in `args_file`. See `engines.registry`."""
    return TransformersGenerator(model_path, load_engine_args(args_file, TransformersEngineArgs))
