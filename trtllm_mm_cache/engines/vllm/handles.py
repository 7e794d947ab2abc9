"""What a request tells the connector about its embeddings: where in which arena each of them lies.

It travels in `SamplingParams.extra_args["ec_transfer_params"]`, by identifier, through vLLM's own message to
EngineCore. There it is a plain list: vLLM's msgpack knows no classes of ours.
"""

from __future__ import annotations

from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.own_tower import Fill

LOAD = "load"
"""First element of an entry: the embedding is complete and is to be copied into vLLM's encoder cache."""


FILL = "fill"
"""First element of an entry: the vision tower is to make the embedding, and a worker copies it out."""


def load_entry(handle: Handle) -> list[Any]:
    """Return the entry that has an embedding loaded from `handle`."""
    return [LOAD, *plain(handle)]


def fill_entry(fill: Fill) -> list[Any]:
    """Return the entry that has what the tower makes copied to where `fill` says."""
    return [FILL, fill.nonce, plain(fill.target), plain(fill.mark)]


def handle_of(entry: list[Any]) -> Handle:
    """Return the handle in an entry of `load_entry`."""
    return handle_from(entry[1:])


def fill_of(entry: list[Any]) -> Fill:
    """Return what an entry of `fill_entry` says."""
    _, nonce, target, mark = entry
    return Fill(handle_from(target), handle_from(mark), nonce)


def plain(handle: Handle) -> list[Any]:
    """Return a handle as a plain list."""
    dtype = str(handle.dtype).removeprefix("torch.")
    return [
        handle.manager,
        handle.file,
        handle.storage_bytes,
        handle.offset,
        dtype,
        list(handle.shape),
    ]


def handle_from(listed: list[Any]) -> Handle:
    """Return the handle in a list of `plain`."""
    manager, file, storage_bytes, offset, dtype, shape = listed
    return Handle(manager, file, storage_bytes, offset, getattr(torch, dtype), tuple(shape))
