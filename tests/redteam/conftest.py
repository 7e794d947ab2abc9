"""One deployment for all that attack it and leave it whole, and who belongs to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import deal, model_dir, oracle
from tests.redteam.deployment import Deployment, deployed

__all__ = ["deal", "model_dir", "oracle"]


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("redteam")) as running:
        yield running
