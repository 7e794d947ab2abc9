"""`tensorrt_llm/_torch/shared_tensor/shared_tensor.py`, 1.3, for tensors on the CPU."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.reductions import (
    rebuild_storage_filename,
    rebuild_tensor,
    reduce_storage,
    reduce_tensor,
)

_REBUILD_CPU = 2
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
        assert tensor.device.type == "cpu", "the peer has no CUDA"
        _, handle = reduce_tensor(tensor)
        return cls(_REBUILD_CPU, handle)

    def dump_to_dict(self) -> dict[str, Any]:
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
        return rebuild_tensor(*self.tensor_handle)


def _patiently(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Ask again where torch's helper process has not answered within its second: test machines are busy."""
    for _ in range(9):
        try:
            return ask(*arguments)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
    return ask(*arguments)
