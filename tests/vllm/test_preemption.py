"""Too little room for keys and values: vLLM takes answers back and computes them again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.engines.contract import chat_case, picture
from tests.engines.with_tower import GREEDY
from tests.vllm.conftest import ended, started

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # engines are started, some twice


async def test_answers_that_were_preempted_are_what_they_are_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each prompt fits; four with their answers do not. vLLM's caches are off or too small to hide a load."""
    engine = await started(
        "demo",
        tmp_path_factory,
        dtype="float32",
        enable_prefix_caching=False,
        block_size=32,
        num_gpu_blocks_override=24,
        max_model_len=512,
    )
    try:
        long = replace(GREEDY, max_tokens=200, logprobs=0)
        cases = [chat_case(engine.model_dir, [picture(seed, 112, 112)]) for seed in range(4)]
        leases = [engine.lease(engine.encode(case.images[0])) for case in cases]
        asked = list(zip(cases, leases, strict=True))
        alone = [await engine.answer(case.request, [lease], long) for case, lease in asked]
        assert len({answer.tokens for answer in alone}) > 1, "the images make a difference"
        assert not (engine.folder / "preempted").exists()
        await engine.forget()
        together = await asyncio.gather(
            *(engine.answer(case.request, [lease], long) for case, lease in asked)
        )
        assert (engine.folder / "preempted").exists(), "the room was too small for all of them"
        assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
        for lease in leases:
            lease.release()
    finally:
        await ended(engine)
