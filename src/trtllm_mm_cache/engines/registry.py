"""Loads the engine that the settings name; the only place that knows both by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_mm_cache.config import EngineName, load_engine_args
from trtllm_mm_cache.errors import ConfigurationError

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.base import Generator, VisionEncoder

_INSTALL = "install it with: pip install 'trtllm-mm-cache[{engine}]'"


def load_vision_encoder(engine: EngineName, model_path: Path, args_file: Path | None) -> VisionEncoder:
    """Load `model_path`'s vision tower. Blocking, seconds to minutes.

    Raises `ConfigurationError` when the engine is not installed, the model is not one it serves,
    or `args_file` holds a key it does not know.
    """
    try:
        if engine == "transformers":
            from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

            return TransformersVisionEncoder(model_path, load_engine_args(args_file, TransformersEngineArgs))
    except ModuleNotFoundError as error:
        raise _not_installed(engine, error) from error
    raise ConfigurationError(f"engine '{engine}' is not part of this release; use --engine transformers")


def load_generator(engine: EngineName, model_path: Path, args_file: Path | None) -> Generator:
    """Load `model_path`'s language model. Blocking, seconds to minutes. Raises as `load_vision_encoder`."""
    try:
        if engine == "transformers":
            from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersGenerator

            return TransformersGenerator(model_path, load_engine_args(args_file, TransformersEngineArgs))
    except ModuleNotFoundError as error:
        raise _not_installed(engine, error) from error
    raise ConfigurationError(f"engine '{engine}' is not part of this release; use --engine transformers")


def _not_installed(engine: EngineName, error: ModuleNotFoundError) -> ConfigurationError:
    how = _INSTALL.format(engine=engine)
    return ConfigurationError(f"engine '{engine}' needs {error.name}, which is not installed; {how}")
