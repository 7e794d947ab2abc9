"""The embedded default engine: Hugging Face transformers on the CPU or any torch device.

What needs torch and transformers is imported on its first use: `check` is asked before anything starts.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.huggingface.architectures import architecture_of
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs, dtype_name
from trtllm_mm_cache.errors import ConfigurationError

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.transformers.encoder import TransformersVisionEncoder
    from trtllm_mm_cache.engines.transformers.generator import TransformersGenerator
    from trtllm_mm_cache.engines.transformers.preprocess import embedding_shape

__all__ = [
    "TransformersEngineArgs",
    "TransformersGenerator",
    "TransformersVisionEncoder",
    "check",
    "embedding_dtype",
    "embedding_shape",
    "follow",
    "import_all",
    "load_generator",
    "load_own_tower",
    "load_vision_encoder",
]

logger = logging.getLogger(__name__)

PACKAGE = "transformers"
_HEAVY = {
    "TransformersVisionEncoder": "encoder",
    "TransformersGenerator": "generator",
    "embedding_shape": "preprocess",
}
"""Names that this package exports, by the module that defines them."""


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)


def import_all() -> None:
    """Import torch, transformers and the modules over them. See `engines.registry`."""
    for module in ("encoder", "follower", "generator", "leader", "preprocess"):
        importlib.import_module(f"{__name__}.{module}")


def check(half: Literal["encode", "pd"], config: Mapping[str, Any], args_file: Path | None) -> None:
    """Check YAML file and architecture. See `engines.registry`."""
    del half
    load_engine_args(args_file, TransformersEngineArgs)
    if config:
        architecture_of(str(config.get("model_type")))


def load_vision_encoder(model_path: Path, args_file: Path | None) -> TransformersVisionEncoder:
    """Load the vision half with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.transformers.encoder import TransformersVisionEncoder

    return TransformersVisionEncoder(model_path, load_engine_args(args_file, TransformersEngineArgs))


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings by the settings in `args_file`. See `engines.registry`."""
    del model_path
    return dtype_name(load_engine_args(args_file, TransformersEngineArgs).resolved_embedding_dtype())


def load_generator(model_path: Path, args_file: Path | None) -> TransformersGenerator:
    """Load the language half with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.transformers.generator import TransformersGenerator
    from trtllm_mm_cache.engines.transformers.leader import ranks_of_job

    args = load_engine_args(args_file, TransformersEngineArgs)
    if args.resolved_device().type != "cpu":
        logger.warning(
            "the transformers engine computes one request at a time, on a GPU too: it is the reference; "
            "to serve many at once use vLLM, SGLang or TensorRT-LLM (--engine)"
        )
    return TransformersGenerator(model_path, args, ranks_of_job(model_path))


def load_own_tower(model_path: Path, args_file: Path | None, *, kept: bool) -> NoReturn:
    """Raise `ConfigurationError`: its vision tower runs in encode workers. See `engines.registry`."""
    del model_path, args_file, kept
    raise ConfigurationError(
        "transformers takes embeddings of encode workers only: leave out --disaggregation-mode agg, "
        "or use --engine vllm"
    )


def follow(args_file: Path | None) -> None:
    """Compute as a rank other than 0 with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.transformers.follower import follow as follow_rank_0

    follow_rank_0(load_engine_args(args_file, TransformersEngineArgs))
