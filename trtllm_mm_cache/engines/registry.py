"""Loads the engine that the settings name. Each engine's package has the two functions of `Engine`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.imports import without_collector
from trtllm_mm_cache.settings import EngineName

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.base import Generator, VisionEncoder
    from trtllm_mm_cache.engines.own_tower import OwnTowerGenerator


Half = Literal["encode", "pd"]
"""Which worker's half of a model; also the stem of its engine's YAML file in configs/."""


class Engine(Protocol):
    """What the package of an engine offers. To load a model blocks for seconds to minutes.

    All raise `ConfigurationError` when the model is not one that the engine serves, or when
    `args_file` holds a key that it does not know.
    """

    PACKAGE: str
    """The Python package that runs the model."""

    def import_all(self) -> None:
        """Import what the functions below need: seconds. Raises `ModuleNotFoundError`."""
        ...

    def check(self, half: Half, config: Mapping[str, Any], args_file: Path | None) -> None:
        """Raise what a worker would raise for its YAML file or for the model of `config` (its config.json).

        An empty `config` is one that is not known yet.

        Imports no library of the engine's: milliseconds.
        """
        ...

    def load_vision_encoder(self, model_path: Path, args_file: Path | None) -> VisionEncoder:
        """Load the model's vision tower."""
        ...

    def embedding_dtype(self, model_path: Path, args_file: Path | None) -> str:
        """Return the name of the dtype that embeddings are stored in. Loads no weights."""
        ...

    def load_generator(self, model_path: Path, args_file: Path | None) -> Generator:
        """Load the model's language half; on rank 0 of an mpirun job, spread over all its ranks."""
        ...

    def load_own_tower(self, model_path: Path, args_file: Path | None, *, kept: bool) -> OwnTowerGenerator:
        """Load the whole model, vision tower included; `kept` says whether what that makes is cached.

        Raises `ConfigurationError` where the engine takes embeddings of encode workers only.
        """
        ...

    def follow(self, args_file: Path | None) -> None:
        """Compute as another rank of the job; returns when rank 0 has ended the worker.

        Raises `ConfigurationError` where the engine has a launcher of its own for its ranks.
        """
        ...


def find_engine(name: EngineName) -> Engine:
    """Return the package of an engine, for its checks: nothing heavy is imported."""
    return cast(Engine, importlib.import_module(f"trtllm_mm_cache.engines.{name}"))


def load_engine(name: EngineName) -> Engine:
    """Import an engine, in seconds; raises `ConfigurationError` when what it needs is not installed."""
    engine = find_engine(name)
    try:
        with without_collector():
            engine.import_all()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"engine '{name}' needs {error.name}, which is not installed; "
            f"install it with: pip install 'trtllm-mm-cache[{name}]'"
        ) from error
    return engine
