"""Where a model's files lie, and how Dynamo's frontend learns that a worker serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from dynamo.llm import ModelInput, ModelType, WorkerType, fetch_model, register_model
from dynamo.runtime import Endpoint

from trtllm_mm_cache.errors import ConfigurationError


async def local_model_path(model: str, *, weights: bool = True) -> str:
    """Return the directory of `model`, downloading a hub name's files first if need be, `weights` or not.

    Raises `ConfigurationError` when it is neither a directory nor a name the hub can serve.
    """
    path = Path(model)
    if await asyncio.to_thread(path.is_dir):
        return str(path)
    if path.is_absolute() or model.startswith("."):
        raise ConfigurationError(f"--model-path {model} is not a directory")
    try:
        return str(await fetch_model(model, ignore_weights=not weights))
    except Exception as error:
        raise ConfigurationError(
            f"--model-path {model} is no directory here, and the hub gave no model of that name: {error}"
        ) from error


async def offer_model(endpoint: Endpoint, model_path: str, name: str, adapters: Sequence[str] = ()) -> None:
    """Register with discovery that `endpoint` serves the model of `model_path` as `name`, and its adapters.

    Dynamo's frontend then asks for an adapter as for a model, with `routing.lora_name` in the request. The
    encode worker is never among the model's `needs`: without it text and cached images go on.
    """
    for adapter in (None, *adapters):
        await register_model(
            ModelInput.Tokens,
            ModelType.Chat | ModelType.Completions,
            endpoint,
            model_path,
            adapter or name,
            worker_type=WorkerType.Aggregated,
            lora_name=adapter,
            base_model_path=None if adapter is None else model_path,
        )
