"""One deployment for all tests of two hosts, and the model's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.deployment import Deployment, deployed
from tests.hosts.network import reason_to_skip


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    reason = reason_to_skip("etcd")
    if reason is not None:
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("hosts")
    with deployed(folder) as running:
        yield running
