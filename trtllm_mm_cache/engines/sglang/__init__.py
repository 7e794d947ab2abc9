"""SGLang as the engine of a PD worker. Imports nothing of `sglang` until the engine is loaded.

The encode worker runs the model's tower in transformers (`--engine transformers`), and SGLang gets its
embeddings.
SGLang's own processes import `handed_over` from here, so importing this package must stay cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from trtllm_mm_cache.errors import ConfigurationError

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.sglang.generator import SglangGenerator
    from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs

__all__ = [
    "SglangEngineArgs",
    "SglangGenerator",
    "check",
    "embedding_dtype",
    "follow",
    "import_all",
    "load_generator",
    "load_vision_encoder",
]

PACKAGE = "sglang"
_LAZY = {"SglangGenerator": "generator", "SglangEngineArgs": "settings"}
"""Names that this package exports, by the module that defines them."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def import_all() -> None:
    """Import SGLang and the adapter over it. See `engines.registry`."""
    from trtllm_mm_cache.engines.sglang.support import import_sglang

    importlib.import_module(f"{__name__}.generator")
    import_sglang()


def check(half: Literal["encode", "pd"], config: Mapping[str, Any], args_file: Path | None) -> None:
    """Check YAML file and architecture. See `engines.registry`."""
    if half == "encode":
        _no_encoder()
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
    from trtllm_mm_cache.engines.sglang.support import check_architecture

    load_engine_args(args_file, SglangEngineArgs)
    if config:
        check_architecture(str(config.get("model_type")))


def load_vision_encoder(model_path: Path, args_file: Path | None) -> NoReturn:
    """Raise `ConfigurationError`: SGLang runs no encode worker. See `engines.registry`."""
    del model_path, args_file
    _no_encoder()


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings by the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs

    return load_engine_args(args_file, SglangEngineArgs).resolved_dtype(model_path)


def load_generator(model_path: Path, args_file: Path | None) -> SglangGenerator:
    """Load the model with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.sglang.generator import SglangGenerator
    from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs

    return SglangGenerator(model_path, load_engine_args(args_file, SglangEngineArgs))


def follow(args_file: Path | None) -> None:
    """Raise `ConfigurationError`: SGLang starts its schedulers itself."""
    del args_file
    raise ConfigurationError(
        "SGLang starts its own schedulers: set tp_size in the PD worker's YAML file, without mpirun"
    )


def _no_encoder() -> NoReturn:
    raise ConfigurationError(
        "SGLang runs no encode worker: start it with --engine transformers, whose embeddings SGLang takes"
    )
