"""`tensorrt_llm/_torch/shared_tensor/shared_tensor.py`, 1.3: handles of host memory and of CUDA IPC."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.reductions import (
    rebuild_cuda_tensor,
    rebuild_storage_filename,
    rebuild_tensor,
    reduce_storage,
    reduce_tensor,
)

_REBUILD_CUDA = 1
_REBUILD_CPU = 2

# What torch's reduction of a CUDA tensor holds, after the tensor's class; None: the storage's class.
_CUDA_FIELDS = (
    "tensor_size",
    "tensor_stride",
    "tensor_offset",
    None,
    "dtype",
    "storage_device",
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "requires_grad",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}


class SharedTensorContainer:
    """Holds what torch's reductions give for a tensor, and writes and reads it as a JSON-safe dict."""

    def __init__(self, method_key: int, tensor_handle: tuple[Any, ...]) -> None:
        self.method_key = method_key
        self.tensor_handle = tensor_handle

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> SharedTensorContainer:
        rebuild, handle = reduce_tensor(tensor)
        return cls(_REBUILD_CUDA if rebuild is rebuild_cuda_tensor else _REBUILD_CPU, handle)

    def dump_to_dict(self) -> dict[str, Any]:
        if self.method_key == _REBUILD_CUDA:
            parts = zip(_CUDA_FIELDS, self.tensor_handle[1:], strict=True)
            return {"method_key": _REBUILD_CUDA} | {name: _written(part) for name, part in parts if name}
        _, storage, (offset, size, stride, _) = self.tensor_handle
        before = get_sharing_strategy()
        set_sharing_strategy("file_system")
        try:
            manager, name, storage_size, dtype = _patiently(reduce_storage, storage)[-1][1:]
        finally:
            set_sharing_strategy(before)
        return {
            "tensor_storage_offset": offset,
            "tensor_size": list(size),
            "tensor_stride": list(stride),
            "manager_handle": base64.b64encode(manager).decode(),
            "storage_handle": base64.b64encode(name).decode(),
            "storage_size": storage_size,
            "storage_dtype": str(dtype),
            "method_key": self.method_key,
        }

    @classmethod
    def from_dict(cls, tensor_info: dict[str, Any]) -> SharedTensorContainer:
        if tensor_info["method_key"] == _REBUILD_CUDA:
            parts = (
                _read(name, tensor_info) if name else torch.storage.TypedStorage for name in _CUDA_FIELDS
            )
            return cls(_REBUILD_CUDA, (torch.Tensor, *parts))
        if tensor_info["method_key"] != _REBUILD_CPU:
            raise ValueError(f"Unsupported shared tensor method key: {tensor_info['method_key']}")
        dtype = _DTYPES[tensor_info["storage_dtype"]]
        storage = _patiently(
            rebuild_storage_filename,
            torch.storage.TypedStorage,
            base64.b64decode(tensor_info["manager_handle"]),
            base64.b64decode(tensor_info["storage_handle"]),
            tensor_info["storage_size"],
            dtype,
        )
        if not isinstance(storage, torch.storage.TypedStorage):
            storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        size, stride = tuple(tensor_info["tensor_size"]), tuple(tensor_info["tensor_stride"])
        place = (tensor_info["tensor_storage_offset"], size, stride, False)
        return cls(_REBUILD_CPU, (torch.Tensor, storage, place))

    def get_local_view(self) -> torch.Tensor:
        rebuild = rebuild_cuda_tensor if self.method_key == _REBUILD_CUDA else rebuild_tensor
        return rebuild(*self.tensor_handle)


def _written(part: Any) -> Any:
    """Return a part of a CUDA handle as JSON takes it."""
    if isinstance(part, bytes):
        return base64.b64encode(part).decode()
    if isinstance(part, torch.dtype):
        return str(part)
    return list(part) if isinstance(part, tuple) else part


def _read(name: str, tensor_info: dict[str, Any]) -> Any:
    """Return what `_written` was given."""
    part = tensor_info[name]
    if name == "dtype":
        return _DTYPES[part]
    if name.endswith("_handle"):
        return base64.b64decode(part)
    return tuple(part) if isinstance(part, list) else part


def _patiently(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Ask again where torch's helper process has not answered within its second: test machines are busy."""
    for _ in range(9):
        try:
            return ask(*arguments)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
    return ask(*arguments)
