"""LoRA adapters with random weights, as PEFT saves them, and models that have one merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj", "down_proj")


def adapted(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the modules of the language model that an adapter is for, with their weights."""
    for name, weight in weights.items():
        if "visual" not in name and name.removesuffix(".weight").endswith(MODULES):
            yield name.removesuffix(".weight"), weight


def write_adapter(model_dir: Path, folder: Path, seed: int, *, rank: int = RANK, rename: str = "") -> Path:
    """Write an adapter large enough to change a model's tokens; `rename` stands before its modules' names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, weight in adapted(load_file(model_dir / "model.safetensors")):
        high, wide = weight.shape
        name = f"base_model.model.{rename}{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, wide, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(high, rank, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return folder


def write_merged(model_dir: Path, adapter: Path, folder: Path) -> Path:
    """Write the model with the adapter in its weights, W + B A alpha / r, computed here."""
    shutil.copytree(model_dir, folder)
    weights, tensors = (
        load_file(model_dir / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for module, weight in list(adapted(weights)):
        first, second = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        weights[f"{module}.weight"] = weight.float() + second @ first * (ALPHA / RANK)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
