"""Two workers that share each layer: both read the one arena, and the answer is that of one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.engines.contract import chat_case
from tests.vllm.conftest import ended, started
from tests.vllm.engine import START_DEADLINE_S, Engine
from tests.vllm.models import CARD, DEMO
from tests.vllm.own_tower import end, start
from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT
from trtllm_mm_cache.engines.base import SamplingParams

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # engines are started, some twice


def arenas_mapped_by(process: psutil.Process, engine: Engine) -> set[str]:
    """Return the files of this process's arenas that another process has mapped."""
    _, name, _ = engine.cache.arena.storage._share_filename_cpu_()
    arena = str(SHARED_MEMORY_ROOT / os.fsdecode(name).lstrip("/"))
    return {mapped.path for mapped in process.memory_maps(grouped=True) if mapped.path == arena}


async def test_two_ranks_load_from_one_arena(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = await started("demo", tmp_path_factory, tensor_parallel_size=2)
    try:
        card = Image.open(CARD).convert("RGB")
        decode = engine.generator._check.expander._decode
        for image, place in (
            (card, "top right"),
            (card.transpose(Image.Transpose.ROTATE_180), "bottom left"),
        ):
            case = chat_case(engine.model_dir, [image], ["", "Where is the yellow cross?"])
            with engine.lease(engine.encode(image)) as lease:
                answer = await engine.answer(case.request, [lease], SamplingParams(max_tokens=12))
            assert decode(list(answer.tokens)).removesuffix("<|im_end|>") == place
        loads = {Path(file).suffix[1:]: file.read_text().split() for file in engine.folder.glob("loads.*")}
        assert len(loads) == 2, "each rank loads for itself"
        first, second = loads.values()
        assert first == second
        assert len(first) == 2
        for pid in loads:
            assert arenas_mapped_by(psutil.Process(int(pid)), engine), "in place, not a copy of the arena"
    finally:
        await ended(engine)


async def test_two_ranks_fill_an_extent_once_and_both_load_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aggregated: both ranks have what the tower made; one counts it and copies it out."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    async with asyncio.timeout(2 * START_DEADLINE_S):
        own = await asyncio.to_thread(lambda: start(DEMO, capacity=1 << 20, tensor_parallel_size=2))
    try:
        card = Image.open(CARD).convert("RGB")
        views = {"top right": card, "bottom left": card.transpose(Image.Transpose.ROTATE_180)}
        decode = own.generator._check.expander._decode
        for _ in range(2):
            for place, image in views.items():
                case = chat_case(own.model_dir, [image], ["", "Where is the yellow cross?"])
                answer = await own.answer(case, SamplingParams(max_tokens=12))
                assert decode(list(answer.tokens)).removesuffix("<|im_end|>") == place
            await own.forget()
            assert own.generator.encodes == 2, "one rank counts, and a hit runs no tower"
        assert own.bench.cache.statistics().entries == 2
        assert own.bench.tower.checks.refused == 0
    finally:
        await end(own)
