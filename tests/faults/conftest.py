"""The bench of the resolver's tests, and one deployment of real processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import deal, model_dir, oracle
from tests.faults.deployment import Deployment, deployed
from tests.pd.bench import allow_private_addresses, bench, require_salt, settings

__all__ = [
    "allow_private_addresses",
    "bench",
    "deal",
    "deployment",
    "model_dir",
    "oracle",
    "require_salt",
    "settings",
]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Deployment]:
    """Frontend, PD worker and two peers, shared by all tests here."""
    with deployed(tmp_path_factory.mktemp("faults"), model_dir) as up:
        yield up


@pytest.fixture
def deployment(running: Deployment) -> Iterator[Deployment]:
    """The running deployment; afterwards everything that a test killed runs again and is well."""
    yield running
    running.fault("good")
    for service in (running.pd, *running.peers):
        if not service.alive:
            service.start()
            service.wait_ready()
