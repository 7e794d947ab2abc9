"""Which models and which releases of TensorRT-LLM this engine serves, and why not others.

What "embeddings from another process" needs was read from TensorRT-LLM's public source (see
docs/tensorrt-llm.md): an input processor that can rebuild a prompt from embedding handles
(`support_mm_disagg`), and a vision tower that `MultimodalEncoder` can load without the language model.
Everything else would leave only the attach path (`multi_modal_embeddings`), which is refused: it carries
no hash of the image, so with KV block reuse two requests with the same text and images of the same size
could share blocks, and for Qwen it guesses the grid from the row count.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

FIRST_RELEASE = "1.3.0rc21"
LAST_RELEASE = "1.3"
"""The releases whose source this engine was written against: from the first up to any of the last."""


@dataclass(frozen=True)
class TrtllmArchitecture:
    """How one image is encoded alone, and what its embedding brings into a prompt.

    `encoder_prompt` is the text around one image placeholder that the vision encoder is given.
    `has_mrope`: the decoder takes three position axes, computed from each image's grid.
    `max_images`: most images in one prompt, or None.
    """

    model_type: str
    encoder_prompt: str
    has_mrope: bool = False
    max_images: int | None = None


_QWEN_PROMPT = "<|vision_start|><|image_pad|><|vision_end|>"

_SUPPORTED: Mapping[str, TrtllmArchitecture] = {
    architecture.model_type: architecture
    for architecture in (
        # LlavaNextInputProcessor takes one embedding handle a request and raises for more.
        TrtllmArchitecture("llava_next", "<image>", max_images=1),
        TrtllmArchitecture("qwen2_5_vl", _QWEN_PROMPT, has_mrope=True),
        TrtllmArchitecture("qwen3_vl", _QWEN_PROMPT, has_mrope=True),
        TrtllmArchitecture("qwen3_vl_moe", _QWEN_PROMPT, has_mrope=True),
    )
}

_REASONS: Mapping[str, str] = {
    "qwen2_vl": "TensorRT-LLM rebuilds prompts from embeddings for Qwen2.5-VL and Qwen3-VL, not for Qwen2-VL",
    "llava": "TensorRT-LLM has a vision encoder of its own for LLaVA-NeXT, not for LLaVA-1.5",
    "llama4": "TensorRT-LLM encodes Llama 4's images inside the language model's workers",
}


def architecture_of(model_path: Path) -> TrtllmArchitecture:
    """Return the entry of the model in `model_path`.

    Raises `ConfigurationError` with the reason when the model's images cannot be encoded elsewhere.
    """
    try:
        model_type = json.loads((model_path / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError("the model directory has no config.json with a model_type") from error
    return architecture(model_type)


def architecture(model_type: str) -> TrtllmArchitecture:
    """Return the entry of a config.json's `model_type`. Raises `ConfigurationError` as `architecture_of`."""
    if model_type in _SUPPORTED:
        return _SUPPORTED[model_type]
    reason = _REASONS.get(
        model_type, "TensorRT-LLM is not known to take this model's embeddings from another process"
    )
    raise ConfigurationError(
        f"the trtllm engine does not serve the architecture {model_type!r}: {reason}; it serves "
        f"{', '.join(sorted(_SUPPORTED))}; the transformers engine serves more (--engine transformers)"
    )


def import_tensorrt_llm() -> Any:
    """Import TensorRT-LLM (seconds) and warn when it is another release than this engine was written for.

    Returns the module. Raises `ConfigurationError` when it is not installed or does not load.
    """
    try:
        import tensorrt_llm
    except ImportError as error:
        raise ConfigurationError(
            f"engine 'trtllm' needs the Python package tensorrt_llm, which cannot be imported ({error}); "
            "install it with: pip install 'trtllm-mm-cache[trtllm]', or use --engine transformers"
        ) from error
    version = str(tensorrt_llm.__version__)
    if not is_known_release(version):
        logger.warning(
            "TensorRT-LLM %s is outside the releases this engine was written for (%s to %s.x): answers may "
            "be wrong where its handling of embedding handles has changed",
            version,
            FIRST_RELEASE,
            LAST_RELEASE,
        )
    return tensorrt_llm


def start_engine(engine_class: Callable[..., Any], model_path: Path, arguments: Mapping[str, Any]) -> Any:
    """Return a loaded engine of `engine_class`. Blocking: minutes.

    Raises `ConfigurationError` with the engine's own words when it refuses model or arguments.
    """
    try:
        return engine_class(model=str(model_path), **arguments)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"TensorRT-LLM could not load the model: {error}") from error


@contextmanager
def shut_down_on_failure(engine: Any) -> Iterator[None]:
    """Let no engine process outlive a start that fails after it was loaded."""
    try:
        yield
    except BaseException:
        engine.shutdown()
        raise


def is_known_release(version: str) -> bool:
    """Whether `version` lies between `FIRST_RELEASE` and the last of `LAST_RELEASE`."""
    try:
        found = Version(version)
    except InvalidVersion:
        return False
    return found >= Version(FIRST_RELEASE) and found.release[:2] <= Version(LAST_RELEASE).release[:2]


def require_separate_worker() -> None:
    """Raise `ConfigurationError` when the encoder's model would run in this very process.

    It then exports handles that only another process can open.
    """
    if os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1":
        raise ConfigurationError(
            "TLLM_WORKER_USE_SINGLE_PROCESS=1 runs the vision tower in the encode worker's own process, "
            "which cannot open the handles that it exports: unset it"
        )


def check_ranks(tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    """Refuse a model spread over another number of ranks than mpirun started.

    `trtllm-llmapi-launch` tells its command the number of ranks in `tllm_mpi_size` (read in
    `tensorrt_llm/llmapi/trtllm-llmapi-launch`, 1.3); without it the engine starts its ranks itself.
    Raises `ConfigurationError`.
    """
    started = int(os.environ.get("tllm_mpi_size") or 1)  # noqa: SIM112 (the launcher's spelling)
    wanted = tensor_parallel_size * pipeline_parallel_size
    if started not in (1, wanted):
        raise ConfigurationError(
            f"mpirun started {started} ranks, but the engine configuration spreads the model over {wanted} "
            f"(tensor_parallel_size {tensor_parallel_size} x pipeline_parallel_size "
            f"{pipeline_parallel_size}); make both numbers the same"
        )
