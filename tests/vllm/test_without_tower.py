"""As it is served vLLM loads no vision tower where encode workers have one: less memory, the same answers.

Qwen3-VL keeps it: vLLM takes a model without a tower for one without deepstack.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.answers import Answer, collect
from tests.engines.contract import chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.vllm.engine import DEADLINE_S, START_DEADLINE_S, Engine, start_generator
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.vllm import VllmEngineArgs, VllmGenerator
from trtllm_mm_cache.engines.vllm.support import Tower, engine_arguments

WITH_TOWER = ("qwen3_vl",)


@pytest.mark.parametrize(
    ("model", "own", "tower"),
    [("llava", False, False), ("llava", True, True), ("qwen3_vl", False, True), ("qwen3_vl", True, True)],
)
async def test_who_loads_a_tower(tmp_path: Path, model: str, own: bool, tower: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model, "dtype": "float32"}))
    arguments = engine_arguments(tmp_path, VllmEngineArgs(), Tower(own=own))
    assert ("limit_mm_per_prompt" not in arguments) == tower


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_without_a_tower_answers_are_the_same_to_the_bit(engine: Engine) -> None:
    dtype = str(engine.generator._llm.vllm_config.model_config.dtype).removeprefix("torch.")
    case = chat_case(engine.model_dir, [picture(seed, 112, 112) for seed in (1, 2)])
    leases = [engine.lease(engine.encode(image)) for image in case.images]
    request = replace(case.request, sampling=GREEDY)

    async def answer(generator: VllmGenerator, held: list[Lease]) -> Answer:
        async with asyncio.timeout(DEADLINE_S), aclosing(generator.generate(request, held)) as deltas:
            return (await collect(deltas))[0]

    async with asyncio.timeout(START_DEADLINE_S):
        bare = await asyncio.to_thread(
            lambda: start_generator(engine.model_dir, engine.folder, tower=False, dtype=dtype)
        )
    try:
        expected = await answer(engine.generator, leases)
        swapped = await answer(engine.generator, leases[::-1])
        assert (await answer(bare, leases)).differs(expected) == 0
        assert (await answer(bare, leases[::-1])).differs(swapped) == 0
        assert swapped.differs(expected) > 10 * engine.rounding, "control: the other order"
        (without,), (whole,) = [
            await each._llm.collective_rpc("weights") for each in (bare, engine.generator)
        ]
        print(f"{engine.model_dir.name}: {without / 1e6:.2f} of {whole / 1e6:.2f} MB of weights")
        assert (without == whole) == (engine.model_dir.name in WITH_TOWER)
        assert without <= whole
    finally:
        await bare.close()
        for lease in leases:
            lease.release()
