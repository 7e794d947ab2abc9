"""The vision half: real features by this project's transformers engine, exported as handles.

What it exports it keeps until the importer has opened and dropped it, which it sees in the reference
count that torch keeps in front of the shared bytes; a CUDA tensor's exporter does likewise.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from tensorrt_llm._torch.shared_tensor import SharedTensorContainer
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

_HEADER_BYTES = 64

DEVICE_VARIABLE = "TRTLLM_PEER_DEVICE"
"""Set to `cuda`, the tower computes there and exports what CUDA IPC opens, as the engine itself does."""


class VisionTower:
    def __init__(self, model: Path) -> None:
        device = "cuda" if os.environ.get(DEVICE_VARIABLE) == "cuda" else "cpu"
        self._encoder = TransformersVisionEncoder(model, TransformersEngineArgs(device=device))
        self._exported: list[torch.Tensor] = []

    def encode(self, request: dict[str, Any], send: Any, aborted: Any) -> None:
        del aborted
        self._exported = [tensor for tensor in self._exported if not self._dropped(tensor)]
        items = [EncodeItem(image) for image in request["images"]]
        results = self._encoder.encode([self._encoder.preprocess(item) for item in items])
        images = [result for result in results if isinstance(result, EncodedItem)]
        if len(images) != len(items):
            raise RuntimeError("an image could not be encoded")
        encoded: dict[str, Any] = {
            "multimodal_embedding_handles": [self._export(image.tensor.clone()) for image in images],
            "multimodal_hashes": [self._hash(image.tensor) for image in images],
        }
        rows = iter(image.tensor.shape[0] for image in images)
        token = self._encoder._model.config.image_token_id
        encoded["multimodal_layout"] = {
            "prompt_token_ids": [
                each
                for one in request["token_ids"]
                for each in [one] * (next(rows, 1) if one == token else 1)
            ]
        }
        grids = [image.metadata.grid_thw for image in images if image.metadata.grid_thw is not None]
        if grids:
            ids, deltas = self._positions(request["token_ids"], images, grids)
            encoded["mrope_position_ids_handle"] = self._export(ids)
            encoded["mrope_position_deltas_handle"] = self._export(deltas)
        send({"final": True, "finish_reason": "stop", "encoded": encoded})

    def _export(self, tensor: torch.Tensor) -> dict[str, Any]:
        handle = SharedTensorContainer.from_tensor(tensor).dump_to_dict()
        if not tensor.is_cuda:  # of those torch itself keeps the memory until the importer has dropped it
            self._exported.append(tensor)
        return handle

    @staticmethod
    def _dropped(tensor: torch.Tensor) -> bool:
        return ctypes.c_int.from_address(tensor.untyped_storage().data_ptr() - _HEADER_BYTES).value <= 1

    @staticmethod
    def _hash(tensor: torch.Tensor) -> list[int]:
        digest = blake3(tensor.cpu().view(torch.uint8).numpy()).digest()
        return [int.from_bytes(digest[start : start + 4], "big", signed=True) for start in range(0, 32, 4)]

    def _positions(
        self, token_ids: list[int], images: list[EncodedItem], grids: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the engine's own preprocessing: by Hugging Face's `get_rope_index` on the expanded prompt."""
        model = self._encoder._model
        image_token = model.config.image_token_id
        rows = iter(image.tensor.shape[0] for image in images)
        expanded = [token for one in token_ids for token in [one] * (next(rows) if one == image_token else 1)]
        ids = torch.tensor([expanded])
        positions, deltas = model.get_rope_index(
            ids, mm_token_type_ids=(ids == image_token).int(), image_grid_thw=torch.tensor(grids)
        )
        return positions.clone(), deltas.to(torch.int32).clone()
