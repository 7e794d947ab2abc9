"""A model's configuration and processor, read from its directory; nothing that only videos need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from trtllm_mm_cache.engines.huggingface.architectures import Architecture, architecture_of
from trtllm_mm_cache.errors import ConfigurationError


def read_config(model_path: Path) -> tuple[PreTrainedConfig, Architecture]:
    """Return the model's configuration and its entry in the table of architectures.

    Raises `ConfigurationError` when it cannot be read or the architecture is not served.
    """
    config = load_config(model_path)
    return config, architecture_of(config.model_type)


def load_config(model_path: Path) -> PreTrainedConfig:
    """Return the model's configuration, of whatever architecture. Raises `ConfigurationError`."""
    try:
        return AutoConfig.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the model's config.json cannot be used: {first_line(error)}") from error


class _WithoutVideo:
    """Mixin: a processor class that takes None for its video processor.

    Video processors need torchvision, and a processor that gets no video never calls its own.
    """

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


def load_processor(model_path: Path, config: PreTrainedConfig, *, backend: str = "pil") -> ProcessorMixin:
    """Return the processor of the model's architecture: image processor and tokenizer.

    The `backend` is asked for by name, since the torchvision one resizes differently: else a feature would
    depend on whether torchvision happens to be installed. Only the encode worker's looks at pixels.
    Raises `ConfigurationError` when files are missing or name another processor class, or torchvision is.
    """
    if backend == "torchvision" and importlib.util.find_spec("torchvision") is None:
        raise ConfigurationError(
            "image_processor is torchvision, and the Python package torchvision is not installed; install "
            "the one that belongs to this torch, or set image_processor to pil on both workers"
        )
    processor_class = PROCESSOR_MAPPING[type(config)]
    try:
        image_processor = AutoImageProcessor.from_pretrained(
            model_path, backend=backend, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
        settings, _ = processor_class.get_processor_dict(model_path, local_files_only=True)
        named = settings.get("processor_class", processor_class.__name__)
        if named != processor_class.__name__:
            raise ConfigurationError(
                f"the model asks for {named}; of {config.model_type} models only those with "
                f"{processor_class.__name__} are served"
            )
        without_video: Any = type(processor_class.__name__, (_WithoutVideo, processor_class), {})
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": None}
        arguments = [parts[name] for name in processor_class.get_attributes()]
        return without_video.from_args_and_dict(arguments, settings)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ConfigurationError(f"the model's processor cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text: transformers adds advice and addresses below it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
