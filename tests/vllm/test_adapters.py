"""LoRA adapters on the real engine: each answers for itself, and all of them from one embedding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from tests.engines.answers import Answer
from tests.engines.contract import Case, picture, reference_logits
from tests.engines.with_tower import GREEDY
from tests.vllm import own_tower
from tests.vllm.adapters import write_adapter, write_merged
from tests.vllm.conftest import ended, started
from tests.vllm.engine import START_DEADLINE_S, Engine
from tests.vllm.models import DEMO
from tests.vllm.test_contract import FILLING, case_of, same_tower
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.errors import ConfigurationError, InvalidRequestError

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # engines of their own

NAMES = ("one", "two")
LORA = {"dtype": "float32", "max_lora_rank": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(DEMO, root / name, seed) for seed, name in enumerate(NAMES)}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """The demo model with both adapters, of which a step has one."""
    engine = await started("demo", tmp_path_factory, lora_modules=folders, **LORA)
    assert await engine.generator.load_adapters() == NAMES
    yield engine
    await ended(engine)


async def answer(engine: Engine, case: Case, lease: Lease, name: str | None) -> Answer:
    return await engine.answer(replace(case.request, lora_name=name), [lease], GREEDY)


async def test_one_embedding_serves_all_and_each_answers_as_vllm_does_from_pixels(engine: Engine) -> None:
    case = case_of(engine, 1)
    _, (own,) = await same_tower(engine, case)
    lease = engine.lease(own)
    answers = {}
    for name in (None, *NAMES):
        await engine.forget()
        expected, (made,) = await engine.from_pixels(case, adapter=name)
        assert torch.equal(made, own.tensor), "vLLM's tower has no adapter"
        await engine.forget()
        answers[name] = await answer(engine, case, lease, name)
        assert answers[name].differs(expected) == 0
    assert len({each.tokens for each in answers.values()}) == 3


async def test_an_adapters_answer_is_that_of_a_model_with_its_weights_merged_in(
    engine: Engine, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By transformers, from pixels: nothing of it is vLLM's."""
    case = case_of(engine, 2)
    merged = write_merged(DEMO, folders["one"], tmp_path / "merged")
    lease = engine.lease(engine.encode(case.images[0]))
    first = (await answer(engine, case, lease, "one")).logprobs[0]
    for model_dir, within in ((merged, True), (DEMO, False)):
        logits = reference_logits(replace(case, model_dir=model_dir))
        expected = torch.log_softmax(logits.float(), dim=-1)
        largest = max(abs(each.logprob - expected[each.token_id].item()) for each in first.likeliest)
        assert (largest < 1e-2) == within, largest


async def test_requests_for_several_at_a_time_do_not_mix(engine: Engine) -> None:
    """And vLLM's prefix cache tells adapters apart, with one prompt and one image."""
    case = case_of(engine, 3, filling=FILLING)
    lease = engine.lease(engine.encode(case.images[0]))
    await engine.forget()
    alone = {name: await answer(engine, case, lease, name) for name in (None, *NAMES)}
    assert [each.cached_tokens for each in alone.values()] == [0, 0, 0]
    names = [None, *NAMES] * 3
    together = await asyncio.gather(*(answer(engine, case, lease, name) for name in names))
    for name, each in zip(names, together, strict=True):
        assert each.cached_tokens
        assert each.differs(alone[name]) < engine.rounding


async def test_an_unknown_adapter_never_reaches_vllm(engine: Engine) -> None:
    case = case_of(engine, 4)
    with pytest.raises(InvalidRequestError, match="lora_name"):
        await answer(engine, case, engine.lease(engine.encode(case.images[0])), "three")


async def test_an_adapter_that_vllm_would_not_apply_is_refused_at_the_start(
    engine: Engine, tmp_path: Path
) -> None:
    """Of another model, though its modules have the right names; and one that vLLM itself refuses."""
    alien = write_adapter(DEMO, tmp_path / "alien", 5, rename="model.layers.99.")
    config = alien / "adapter_config.json"
    engine.generator._folders = {"alien": alien}
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "use_dora": True}))
    with pytest.raises(ConfigurationError, match="vLLM cannot load the adapter 'alien'"):
        await engine.generator.load_adapters()
    config.write_text(plain)
    with pytest.raises(ConfigurationError, match=r"'alien' was trained on another model.*layers\.99"):
        await engine.generator.load_adapters()
    case = case_of(engine, 4)
    assert (await answer(engine, case, engine.lease(engine.encode(case.images[0])), None)).tokens


async def test_aggregated_a_miss_under_an_adapter_is_a_hit_for_all(folders: dict[str, Path]) -> None:
    async with asyncio.timeout(START_DEADLINE_S):
        served = await asyncio.to_thread(
            lambda: own_tower.start(DEMO, capacity=1 << 20, lora_modules=folders, **LORA)
        )
    try:
        await served.generator.load_adapters()
        case = case_of(served, 1)  # type: ignore[arg-type]
        expected = {name: await served.alone(case, name) for name in (None, *NAMES)}
        before = served.generator.encodes
        for name in ("one", None, "two"):
            await served.forget()
            assert (await served.answer(case, adapter=name)).differs(expected[name]) == 0
        assert served.generator.encodes == before + 1
        assert len({each.tokens for each in expected.values()}) == 3
        other = replace(case, images=[picture(9, 112, 112)])
        assert (await served.answer(other)).differs(expected[None]) > 0.01
    finally:
        await own_tower.end(served)
