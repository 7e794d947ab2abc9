"""Load one half of a model, the vision half on the encode worker, the text half on the PD worker.

Weights are read for the own half alone, and of the processor nothing that only videos need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging as transformers_logging

from trtllm_mm_cache.engines.fingerprint import model_fingerprint
from trtllm_mm_cache.engines.transformers.architectures import Architecture, architecture_of
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs, dtype_name
from trtllm_mm_cache.engines.transformers.tensor_parallel import (
    check_divisible,
    check_spread,
    parallel_arguments,
)
from trtllm_mm_cache.errors import ConfigurationError, IntegrityError

_ATTENTION = "sdpa"
"""torch's own kernels, which every served architecture has. The other one, eager, shows attention weights to
those that look at a model from inside; a server has no use for it."""


class AbsentModule(nn.Module):
    """Stands where the other half of the model would be; calling it is a defect of this package."""

    def __init__(self, name: str, owner: str) -> None:
        super().__init__()
        self._what = f"{name} is not loaded here: it runs on the {owner} worker alone"

    def forward(self, *_args: object, **_kwargs: object) -> None:
        """Raise `IntegrityError`."""
        raise IntegrityError(self._what)


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


def fingerprint_of(model_path: Path, args: TransformersEngineArgs) -> str:
    """Return the fingerprint that both workers report; see `model_fingerprint`. Blocking: reads all weights.

    The version of transformers is part of it. It brings the image processor and the placeholder text,
    and both have changed between releases in more than the last bit (default resampling, tiling,
    marker tokens). The price is that a cache does not outlive an upgrade and that both workers must
    be upgraded together; the alternative is a wrong embedding that nothing would notice. Left out is
    what moves the last bits only: torch's version, the attention kernel, the processor's model.
    """
    compute = dtype_name(args.resolved_dtype())
    images = "" if args.image_processor == "pil" else f", images by {args.image_processor}"
    return model_fingerprint(
        model_path,
        engine=f"transformers {transformers.__version__} computing in {compute}{images}",
        embedding_dtype=dtype_name(args.resolved_embedding_dtype()),
    )


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


def load_vision_half(
    model_path: Path, config: PreTrainedConfig, architecture: Architecture, args: TransformersEngineArgs
) -> PreTrainedModel:
    """Return the base model with its vision tower and projector; the language model is never read.

    Its `get_image_features` is ready to use. Raises `ConfigurationError` when weights are missing.
    """
    base_class = MODEL_MAPPING[type(config)]
    absent = {architecture.text_module: AbsentModule("the language model", "PD")}
    return _load(_without(base_class, "", absent), model_path, config, args)


def load_text_half(
    model_path: Path,
    config: PreTrainedConfig,
    architecture: Architecture,
    args: TransformersEngineArgs,
    *,
    ranks: int = 1,
) -> PreTrainedModel:
    """Return the generating model without vision tower and projector, which are never read.

    With several `ranks` it is this rank's share of it; torch's process group must exist.
    Raises `ConfigurationError` when weights are missing, or the model cannot be spread over the ranks.
    """
    full_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    absent = {name: AbsentModule("the vision tower", "encode") for name in architecture.vision_modules}
    partial_class = _without(full_class, "model", absent)
    if ranks == 1:
        return _load(partial_class, model_path, config, args)
    check_divisible(config, ranks)
    model = _load(partial_class, model_path, config, args, **parallel_arguments(ranks))
    check_spread(model)
    return model


def _without(model_class: type[Any], owner: str, absent: dict[str, AbsentModule]) -> type[Any]:
    """Return a subclass whose instances carry `absent` in place of submodules of `owner` ("" for itself).

    `from_pretrained` builds a model on the meta device and reads only weights that the model then has,
    so a submodule taken out at the end of the constructor costs neither memory nor reading.
    """

    def initialise(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        module = self.get_submodule(owner)
        for name, placeholder in absent.items():
            setattr(module, name, placeholder)

    attributes = {"__init__": initialise, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), attributes)


def _load(
    model_class: type[Any],
    model_path: Path,
    config: PreTrainedConfig,
    args: TransformersEngineArgs,
    **parallel: Any,
) -> PreTrainedModel:
    if args.torch_threads is not None:
        torch.set_num_threads(args.torch_threads)
    try:
        with _quiet_loading():
            model, report = model_class.from_pretrained(
                model_path,
                config=config,
                dtype=args.resolved_dtype(),
                attn_implementation=_ATTENTION,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # else an error that does not name them; they are checked below
                **parallel,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"the model's weights cannot be read: {first_line(error)}") from error
    incomplete = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    if incomplete:
        raise ConfigurationError(
            f"the model's weights do not fit its config.json: {_enumerate(incomplete)}; download it again"
        )
    model.eval().requires_grad_(False)
    return model.to(args.resolved_device())


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting the other half's weights as unexpected; ours are checked instead."""
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def _enumerate(names: Iterable[str], limit: int = 3) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def first_line(error: Exception) -> str:
    """Return the first line of an error's text: transformers adds advice and addresses below it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
