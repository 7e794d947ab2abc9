"""Which models and which releases of vLLM this engine serves, and how vLLM is started.

Embeddings go to vLLM as an engine input of our own (`engine_input.py`) and our connector (`connector.py`).
What each architecture needs of that was run in vLLM 0.32 on the CPU, and read in 0.33: docs/vllm.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.checks import MOST_LOGPROBS
from trtllm_mm_cache.engines.vllm.handles import plain
from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

FIRST_RELEASE = "0.32"
LAST_RELEASE = "0.33"
"""The releases whose source this engine was written against; 0.32 is the one that it was run on."""

SERVED: Final = ("idefics3", "internvl", "llava", "llava_next", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
"""Architectures (`model_type`) whose answers were compared with vLLM's own, from pixels."""

_WITH_ITS_TOWER: Final = frozenset({"qwen3_vl"})
"""Architectures whose vision tower vLLM must load though it never runs.

vLLM's `Qwen3VLForConditionalGeneration` takes a tower that is missing for a model without deepstack, and an
embedding with its levels then ends EngineCore: "shape mismatch" (0.32, run).
"""

_REASONS: Final[Mapping[str, str]] = {
    "gemma3": "its answers from embeddings were not compared with vLLM's own",
    "llava_onevision": "vLLM tiles its images otherwise than transformers does",
}

_ENVIRONMENT: Final[Mapping[str, str]] = {
    # This process has threads (NIXL, Dynamo's runtime) that a fork would leave with locks held.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
_DEFAULTS: Final[Mapping[str, str]] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # A model's code and weights are local: nothing is asked for over the network.
    "HF_HUB_OFFLINE": "1",
}


WITHOUT_TOWER: Final[Mapping[str, Any]] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}


def check_architecture(model_type: str) -> None:
    """Raise `ConfigurationError` with the reason when a config.json's `model_type` is not served."""
    if model_type in SERVED:
        return
    reason = _REASONS.get(model_type, "its embeddings from another process were not compared with vLLM's own")
    raise ConfigurationError(
        f"the vllm engine does not serve the architecture {model_type!r}: {reason}; it serves "
        f"{', '.join(SERVED)}; the transformers engine serves more (--engine transformers)"
    )


def model_type_of(model_path: Path) -> str:
    """Return config.json's `model_type`. Raises `ConfigurationError` when there is none."""
    try:
        return str(json.loads((model_path / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError("the model directory has no config.json with a model_type") from error


def prepare_environment() -> None:
    """Set what vLLM reads from the environment; before it is imported. The operator's own stays."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def import_vllm() -> Any:
    """Import vLLM (seconds) and warn when it is another release than this engine was written for.

    Returns the module. Raises `ConfigurationError` when it is not installed or does not load.
    """
    prepare_environment()
    try:
        import vllm
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"engine 'vllm' needs the Python package vllm, which cannot be imported ({error}); make an "
            "environment with launch/setup_venv.sh FOLDER vllm, or use --engine transformers"
        ) from error
    version = str(vllm.__version__)
    if not is_known_release(version):
        logger.warning(
            "vLLM %s is outside the releases this engine was written for (%s to %s.x): answers may be wrong "
            "where its encoder cache has changed",
            version,
            FIRST_RELEASE,
            LAST_RELEASE,
        )
    return vllm


def is_known_release(version: str) -> bool:
    """Whether `version` lies between `FIRST_RELEASE` and the last of `LAST_RELEASE`."""
    try:
        found = Version(version)
    except InvalidVersion:
        return False
    return found >= Version(FIRST_RELEASE) and found.release[:2] <= Version(LAST_RELEASE).release[:2]


@dataclass(frozen=True)
class Tower:
    """Whose vision tower makes the embeddings: encode workers', or vLLM's `own`.

    Its own counts what it encodes where `encodes` leads to; without that nothing is kept, and there is no
    connector but for what it repairs on a CPU (`cpu_generators`).
    """

    own: bool = False
    encodes: Handle | None = None

    def connector(self) -> Any:
        """Return vLLM's configuration of our connector."""
        import torch
        from vllm.config import ECTransferConfig

        if self.own and self.encodes is None and torch.cuda.is_available():
            return None
        return ECTransferConfig(
            ec_connector="ArenaConnector",
            ec_connector_module_path="trtllm_mm_cache.engines.vllm.connector",
            ec_role="ec_both" if self.own else "ec_consumer",
            ec_connector_extra_config={} if self.encodes is None else {"encodes": plain(self.encodes)},
        )


def engine_arguments(model_path: Path, args: VllmEngineArgs, tower: Tower) -> dict[str, Any]:
    """Return the keyword arguments of `AsyncEngineArgs`: what was given, and what must hold.

    See `settings.FORCED` for the reasons.
    """
    import torch

    return (
        args.given()
        | _adapter_slots(args)
        | {
            # No images but those that the connector brings: vLLM then loads no tower (`_mark_tower_model`).
            **({} if tower.own or model_type_of(model_path) in _WITH_ITS_TOWER else WITHOUT_TOWER),
            "model": str(model_path),
            "dtype": args.resolved_dtype(model_path),
            "ec_transfer_config": tower.connector(),
            "worker_extension_cls": "trtllm_mm_cache.engines.vllm.connector.WorkerExtension",
            "mm_processor_cache_gb": 0,
            # A tower that runs takes memory of the GPU that must not go to the KV cache.
            "skip_mm_profiling": not (tower.own and torch.cuda.is_available()),
            "max_logprobs": MOST_LOGPROBS,
            "logprobs_mode": "raw_logprobs",
            "model_impl": "vllm",
            "generation_config": "vllm",
            "structured_outputs_config": {"backend": "guidance"},
            "disable_log_stats": True,
            "enable_log_requests": False,
        }
    )


def _adapter_slots(args: VllmEngineArgs) -> dict[str, Any]:
    """On a CPU, give each adapter a place of its own and leave one more empty.

    vLLM 0.32 marks tokens of the base model with the place -1, which its operators for CPUs take for the last
    one: beside a request for an adapter the base model answered with that adapter's weights (run).
    """
    import torch

    if torch.cuda.is_available() or not args.lora_modules:
        return {}
    return {"max_loras": len(args.lora_modules) + 1}


def start_engine(model_path: Path, args: VllmEngineArgs, tower: Tower) -> Any:
    """Return a running `AsyncLLM`. Blocking, seconds to minutes: it starts EngineCore and the workers.

    Call it outside an event loop's thread: vLLM takes the loop of its first request. Raises
    `ConfigurationError` with vLLM's own words when it refuses model or arguments.
    """
    import_vllm()
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(model_path, args, tower)))
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        raise ConfigurationError(f"vLLM could not load the model: {error}") from error
