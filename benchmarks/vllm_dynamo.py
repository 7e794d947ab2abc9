"""Dynamo 1.6.1's own connector for vLLM, told that its device is the CPU: as released it knows GPUs alone.

On the CPU its copies between the two are none: it keeps and hands out what vLLM made, without a second copy.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.vllm_arms import FOLDER_VARIABLE

_MODULE = "dynamo/vllm/multimodal_utils/multimodal_embedding_cache_connector.py"


def _connector_class() -> Any:
    """Load the module from its file: the packages around it import what their audio loaders need."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    sys.path.append(str(folder))  # after ours: ai-dynamo-runtime's is the installed one
    specification = importlib.util.spec_from_file_location("dynamo_connector", folder / _MODULE)
    if specification is None or specification.loader is None:
        raise SystemExit(f"there is no ai-dynamo in {folder}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # vLLM pickles its metadata by name
    specification.loader.exec_module(module)
    return module.DynamoMultimodalEmbeddingCacheConnector


class DynamoOnCpu(_connector_class()):  # type: ignore[misc]
    """See above."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role)
        self._device = "cpu"
