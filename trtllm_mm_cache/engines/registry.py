"""Loads the engine that the settings name. Each engine's package has the two functions of `Engine`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import EngineName

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.base import Generator, VisionEncoder


class Engine(Protocol):
    """What the package of an engine offers. To load a model blocks for seconds to minutes.

    All raise `ConfigurationError` when the model is not one that the engine serves, or when
    `args_file` holds a key that it does not know.
    """

    def load_vision_encoder(self, model_path: Path, args_file: Path | None) -> VisionEncoder:
        """Load the model's vision tower."""
        ...

    def embedding_dtype(self, model_path: Path, args_file: Path | None) -> str:
        """Return the name of the dtype that embeddings are stored in. Loads no weights."""
        ...

    def load_generator(self, model_path: Path, args_file: Path | None) -> Generator:
        """Load the model's language half; on rank 0 of an mpirun job, spread over all its ranks."""
        ...

    def follow(self, args_file: Path | None) -> None:
        """Compute as another rank of the job; returns when rank 0 has ended the worker.

        Raises `ConfigurationError` where the engine has a launcher of its own for its ranks.
        """
        ...


def load_engine(name: EngineName) -> Engine:
    """Import the package of an engine; raises `ConfigurationError` when what it needs is not installed."""
    try:
        return cast(Engine, importlib.import_module(f"trtllm_mm_cache.engines.{name}"))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"engine '{name}' needs {error.name}, which is not installed; "
            f"install it with: pip install 'trtllm-mm-cache[{name}]'"
        ) from error
