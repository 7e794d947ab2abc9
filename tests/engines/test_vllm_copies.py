"""Copies of vLLM's workers, without a GPU. Needs no vLLM."""

from __future__ import annotations

import torch

from tests.engines.vllm_copies import CopiesContract


class TestHostCopies(CopiesContract):
    device = torch.device("cpu")
