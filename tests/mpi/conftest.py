"""Models and mpirun jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.scenarios import ONE_THREAD
from tools.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that loads and answers quickly, for what does not depend on the model."""
    return make_tiny_model("llava", tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a job's folder: the engine's settings, later the result and the output."""
    (tmp_path / "pd.yaml").write_text(ONE_THREAD)
    return tmp_path
