"""Load one half of a model, the vision half on the encode worker, the text half on the PD worker.

Weights are read for the own half alone.
"""

from __future__ import annotations

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
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from trtllm_mm_cache.engines.fingerprint import transformers_fingerprint
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.model_files import first_line
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


def fingerprint_of(model_path: Path, args: TransformersEngineArgs) -> str:
    """Return the fingerprint that both workers report; see `transformers_fingerprint`. Blocking."""
    return transformers_fingerprint(
        model_path,
        release=transformers.__version__,
        dtype=dtype_name(args.resolved_dtype()),
        images=args.image_processor,
        embedding_dtype=dtype_name(args.resolved_embedding_dtype()),
    )


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
