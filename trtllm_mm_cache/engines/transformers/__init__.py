"""The embedded default engine: Hugging Face transformers on the CPU or any torch device."""

from __future__ import annotations

from pathlib import Path

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.transformers.encoder import TransformersVisionEncoder
from trtllm_mm_cache.engines.transformers.follower import follow as follow_rank_0
from trtllm_mm_cache.engines.transformers.generator import TransformersGenerator
from trtllm_mm_cache.engines.transformers.leader import ranks_of_job
from trtllm_mm_cache.engines.transformers.preprocess import embedding_shape
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs, dtype_name

__all__ = [
    "TransformersEngineArgs",
    "TransformersGenerator",
    "TransformersVisionEncoder",
    "embedding_dtype",
    "embedding_shape",
    "follow",
    "load_generator",
    "load_vision_encoder",
]


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TransformersVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    return TransformersVisionEncoder(model_path, load_engine_args(args_file, TransformersEngineArgs))


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings by the settings in `args_file`. See `engines.registry`."""
    del model_path
    return dtype_name(load_engine_args(args_file, TransformersEngineArgs).resolved_embedding_dtype())


def load_generator(model_path: Path, args_file: Path | None) -> TransformersGenerator:
    """Load the language half with the settings in `args_file`. See `engines.registry`."""
    args = load_engine_args(args_file, TransformersEngineArgs)
    return TransformersGenerator(model_path, args, ranks_of_job(model_path))


def follow(args_file: Path | None) -> None:
    """Compute as a rank other than 0 with the settings in `args_file`. See `engines.registry`."""
    follow_rank_0(load_engine_args(args_file, TransformersEngineArgs))
