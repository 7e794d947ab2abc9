"""One SGLang a model, shared by all tests of it; nothing here is collected without SGLang.

SGLang's client belongs to one event loop, so all tests of this folder share the loop of the run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.sglang.models import DEMO, TINY, make_model

if TYPE_CHECKING:
    from tests.sglang.engine import Engine

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            # The first test of a module may start an engine: half a minute, on a busy machine ten times that.
            item.add_marker(pytest.mark.timeout(900))
            callspec = getattr(item, "callspec", None)
            if callspec is not None and callspec.params.get("engine", "demo") != "demo":
                item.add_marker(pytest.mark.long)


async def started(model: str, factory: pytest.TempPathFactory, **settings: object) -> Engine:
    from tests.sglang.engine import START_DEADLINE_S, start

    root = factory.mktemp(model)
    model_dir = DEMO if model == "demo" else await asyncio.to_thread(make_model, model, root)
    async with asyncio.timeout(START_DEADLINE_S):
        return await asyncio.to_thread(lambda: start(model_dir, **settings))


async def ended(engine: Engine) -> None:
    engine.encoder.close()
    await engine.generator.close()
    assert engine.cache.statistics().leased_entries == 0
    engine.cache.check_integrity()
    engine.cache.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=["demo", *TINY])
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    """SGLang with each model in turn, one at a time, all in float32."""
    engine = await started(request.param, tmp_path_factory)
    yield engine
    await ended(engine)
