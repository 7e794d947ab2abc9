"""What a request tells the connector about its embeddings: where in which arena each of them lies.

It travels in `SamplingParams.extra_args["ec_transfer_params"]`, by identifier, through vLLM's own message to
EngineCore. There it is a plain list: vLLM's msgpack knows no classes of ours.
"""

from __future__ import annotations

from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle

LOAD = "load"
"""First element of an entry: the embedding is complete and is to be copied into vLLM's encoder cache."""


def load_entry(handle: Handle) -> list[Any]:
    """Return the entry that has an embedding loaded from `handle`."""
    dtype = str(handle.dtype).removeprefix("torch.")
    return [
        LOAD,
        handle.manager,
        handle.file,
        handle.storage_bytes,
        handle.offset,
        dtype,
        list(handle.shape),
    ]


def handle_of(entry: list[Any]) -> Handle:
    """Return the handle in an entry of `load_entry`."""
    _, manager, file, storage_bytes, offset, dtype, shape = entry
    return Handle(manager, file, storage_bytes, offset, getattr(torch, dtype), tuple(shape))
