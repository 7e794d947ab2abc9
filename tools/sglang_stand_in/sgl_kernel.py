"""Stands in for SGLang's kernel package on a machine without its GPU: names only; each raises when called.

SGLang 0.5 imports `sgl_kernel` everywhere and needs none of it on the path of a CPU with `torch_native`
attention: everything there has a form in plain torch. No wheel for CPUs is on PyPI.
For tests alone: `install.py` puts it into an environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_looked_up_at_import = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    _looked_up_at_import.define(f"{_name}(Tensor a, Tensor b) -> Tensor")


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: this environment has only a stand-in for the kernels")

    missing.__name__ = name
    return missing
