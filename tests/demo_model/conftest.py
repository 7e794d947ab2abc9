"""The demo model as it lies in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL_DIR = Path(__file__).parents[2] / "models/shapes-qwen2-vl"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return MODEL_DIR
