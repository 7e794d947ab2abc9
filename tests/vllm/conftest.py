"""One vLLM a model, shared by all tests of it; nothing here is collected without vLLM.

vLLM's client belongs to one event loop, so all tests of this folder share the loop of the run.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import warnings
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.vllm.models import DEMO, TINY, make_model

if TYPE_CHECKING:
    from tests.vllm.engine import Engine

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():  # vLLM's own, at its import
        warnings.simplefilter("ignore")
        importlib.import_module("trtllm_mm_cache.engines.vllm.connector")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"))


async def started(model: str, factory: pytest.TempPathFactory, **settings: object) -> Engine:
    from tests.vllm.engine import START_DEADLINE_S, start

    root = factory.mktemp(model)
    model_dir = DEMO if model == "demo" else await asyncio.to_thread(make_model, model, root)
    folder = root / "watched"
    folder.mkdir()
    async with asyncio.timeout(START_DEADLINE_S):
        return await asyncio.to_thread(lambda: start(model_dir, folder, **settings))


async def ended(engine: Engine) -> None:
    engine.encoder.close()
    await engine.generator.close()
    assert engine.cache.statistics().leased_entries == 0
    engine.cache.check_integrity()
    engine.cache.close()


QUICK = ("demo", "qwen3_vl")
"""What the quick part of the suite runs: the trained model, and one with deepstack levels."""


def model_params() -> list[Any]:
    """Return every model; those that only the whole suite runs are marked."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ("demo", *TINY)]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=model_params())
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engine]:
    """vLLM with each model in turn, one at a time; tests of one model say `demo_only`."""
    settings = {} if request.param == "demo" else {"dtype": "float32"}
    engine = await started(request.param, tmp_path_factory, **settings)
    yield engine
    await ended(engine)
