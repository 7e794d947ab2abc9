"""vLLM as the engine of a PD worker. Imports nothing of `vllm` until the engine is loaded.

The encode worker runs the model's tower in transformers (`--engine transformers`); vLLM gets its embeddings.
Aggregated there is no encode worker, and vLLM's own tower encodes what is missing (`own_tower.py`).
vLLM's own processes import `connector` from here, so importing this package must stay cheap.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from trtllm_mm_cache.errors import ConfigurationError

if TYPE_CHECKING:
    from trtllm_mm_cache.engines.vllm.generator import VllmGenerator
    from trtllm_mm_cache.engines.vllm.own_tower import VllmOwnTowerGenerator
    from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs

__all__ = [
    "VllmEngineArgs",
    "VllmGenerator",
    "VllmOwnTowerGenerator",
    "check",
    "embedding_dtype",
    "follow",
    "import_all",
    "load_generator",
    "load_own_tower",
    "load_vision_encoder",
]

PACKAGE = "vllm"
_LAZY = {
    "VllmGenerator": "generator",
    "VllmOwnTowerGenerator": "own_tower",
    "VllmEngineArgs": "settings",
}
"""Names that this package exports, by the module that defines them."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def import_all() -> None:
    """Import vLLM and the adapter over it. See `engines.registry`."""
    from trtllm_mm_cache.engines.vllm.support import prepare_environment

    prepare_environment()
    for module in ("vllm", "vllm.v1.engine.async_llm", f"{__name__}.own_tower"):
        importlib.import_module(module)


def check(half: Literal["encode", "pd"], config: Mapping[str, Any], args_file: Path | None) -> None:
    """Check YAML file and architecture. See `engines.registry`."""
    if half == "encode":
        _no_encoder()
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.vllm.adapters import check_adapters
    from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
    from trtllm_mm_cache.engines.vllm.support import check_architecture

    args = load_engine_args(args_file, VllmEngineArgs)
    check_adapters(args.lora_modules, args.max_lora_rank)
    if config:
        check_architecture(str(config.get("model_type")))


def load_vision_encoder(model_path: Path, args_file: Path | None) -> NoReturn:
    """Raise `ConfigurationError`: vLLM runs no encode worker. See `engines.registry`."""
    del model_path, args_file
    _no_encoder()


def embedding_dtype(model_path: Path, args_file: Path | None) -> str:
    """Return the dtype of embeddings by the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs

    return load_engine_args(args_file, VllmEngineArgs).resolved_dtype(model_path)


def load_generator(model_path: Path, args_file: Path | None) -> VllmGenerator:
    """Load the model with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.vllm.generator import VllmGenerator
    from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs

    return VllmGenerator(model_path, load_engine_args(args_file, VllmEngineArgs))


def load_own_tower(model_path: Path, args_file: Path | None, *, kept: bool) -> VllmOwnTowerGenerator:
    """Load the model, vision tower included, with the settings in `args_file`. See `engines.registry`."""
    from trtllm_mm_cache.engines.engine_args import load_engine_args
    from trtllm_mm_cache.engines.vllm.own_tower import VllmOwnTowerGenerator
    from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs

    return VllmOwnTowerGenerator(model_path, load_engine_args(args_file, VllmEngineArgs), kept=kept)


def follow(args_file: Path | None) -> None:
    """Raise `ConfigurationError`: vLLM starts its workers itself."""
    del args_file
    raise ConfigurationError(
        "vLLM starts its own workers: set tensor_parallel_size in the PD worker's YAML file, without mpirun"
    )


def _no_encoder() -> NoReturn:
    raise ConfigurationError(
        "vLLM runs no encode worker: start it with --engine transformers, whose embeddings vLLM takes"
    )
