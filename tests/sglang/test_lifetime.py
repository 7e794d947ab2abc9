"""How long an embedding is leased, and what SGLang may read: never another image's bytes.

The demo model tells where the cross is, so an answer shows which image it came from.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from tests.engines.contract import Case, chat_case
from tests.engines.with_tower import GREEDY
from tests.sglang.conftest import started
from tests.sglang.engine import DEADLINE_S, Engine
from tests.sglang.models import CARD
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.errors import EngineLostError

pytestmark = pytest.mark.parametrize("engine", ["demo"], indirect=True)

QUESTION = SamplingParams(max_tokens=12)
FIRST, TURNED = "top right", "bottom left"
LONG = replace(GREEDY, logprobs=None, max_tokens=600)


def cards() -> tuple[Image.Image, Image.Image]:
    """Return the card and the same turned upside down."""
    card = Image.open(CARD).convert("RGB")
    return card, card.transpose(Image.Transpose.ROTATE_180)


def case_of(engine: Engine, images: int = 1) -> Case:
    return chat_case(engine.model_dir, [cards()[0]] * images, [*[""] * images, "Where is the yellow cross?"])


async def told(engine: Engine, lease: Any, sampling: SamplingParams = QUESTION) -> str:
    """Return what the model says of an embedding."""
    answer = await engine.answer(case_of(engine).request, [lease], sampling)
    return engine.generator._check.expander._decode(list(answer.tokens)).removesuffix("<|im_end|>")


def running_names(engine: Engine) -> list[str]:
    return list(engine.running.manager.rid_to_state)


async def test_the_answer_is_true(engine: Engine) -> None:
    for card, place in zip(cards(), (FIRST, TURNED), strict=True):
        with engine.lease(engine.encode(card)) as lease:
            assert await told(engine, lease) == place


async def test_bytes_that_change_after_the_end_change_no_answer(engine: Engine) -> None:
    """SGLang keeps keys and values by our key, and nothing that it would look up in the arena again."""
    first, turned = (engine.lease(engine.encode(card)) for card in cards())
    assert await told(engine, first) == FIRST
    first.tensor.copy_(turned.tensor)
    assert await told(engine, first) == FIRST, "from SGLang's prefix cache"
    await engine.forget()
    assert await told(engine, first) == TURNED, "control: it reads the arena itself, and not a copy"
    first.release()
    turned.release()


async def test_an_abort_ends_the_work_in_the_scheduler_and_only_then_the_lease(engine: Engine) -> None:
    lease = engine.lease(engine.encode(cards()[0]))
    stream = engine.generator.generate(replace(case_of(engine).request, sampling=LONG), [lease])
    async with asyncio.timeout(DEADLINE_S):
        await anext(stream)
    lease.release()
    (name,) = running_names(engine)
    assert engine.cache.statistics().leased_entries == 1, "held by the generator"
    state = engine.running.manager.rid_to_state[name]
    async with asyncio.timeout(DEADLINE_S):
        await stream.aclose()
    assert engine.cache.statistics().leased_entries == 0
    assert state.finished, "the scheduler itself has said so"
    assert state.out_list == [] or state.out_list[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(state.output_ids) < 600
    assert running_names(engine) == []


async def test_a_lease_is_held_while_the_scheduler_does_not_answer(engine: Engine) -> None:
    """A scheduler that is stopped may be in the middle of a read: nothing may become of these bytes."""
    lease = engine.lease(engine.encode(cards()[0]))
    scheduler = engine.running._processes[0]
    stream = engine.generator.generate(replace(case_of(engine).request, sampling=LONG), [lease])
    async with asyncio.timeout(DEADLINE_S):
        await anext(stream)
    lease.release()
    os.kill(scheduler.pid, signal.SIGSTOP)
    try:
        closing = asyncio.create_task(stream.aclose())
        await asyncio.wait({closing}, timeout=1)
        assert not closing.done()
        assert engine.cache.statistics().leased_entries == 1
    finally:
        os.kill(scheduler.pid, signal.SIGCONT)
    async with asyncio.timeout(DEADLINE_S):
        await closing
    assert engine.cache.statistics().leased_entries == 0


async def test_many_leave_and_nothing_stays_leased(engine: Engine) -> None:
    leases = [engine.lease(engine.encode(card)) for card in cards()]
    request = replace(case_of(engine).request, sampling=LONG)
    streams = [engine.generator.generate(request, [leases[index % 2]]) for index in range(12)]
    asked = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
    for lease in leases:
        lease.release()
    assert engine.cache.statistics().leased_entries == 0
    assert running_names(engine) == []
    with engine.lease(engine.encode(cards()[1])) as lease:
        assert await told(engine, lease) == TURNED


async def test_a_burst_of_both_images_is_answered_without_a_mistake(engine: Engine) -> None:
    leases = [engine.lease(engine.encode(card)) for card in cards()]
    answers = await asyncio.gather(*(told(engine, leases[index % 2]) for index in range(40)))
    assert answers == [FIRST, TURNED] * 20
    for lease in leases:
        lease.release()


async def test_there_is_no_file_of_loads_that_a_kill_would_leave(engine: Engine) -> None:
    assert not os.path.exists(engine.running.manager.load_snapshot_reader.path)  # noqa: ASYNC240


@pytest.mark.long
async def test_the_schedulers_death_is_an_error_with_a_name(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For the worker and for each request under way; nothing hangs, stays leased, or is left of its files."""
    del engine
    mine = await started("demo", tmp_path_factory)
    files = mine.running.files
    assert any(file.is_socket() for file in files)
    try:
        lease = mine.lease(mine.encode(cards()[0]))
        failed = asyncio.create_task(mine.generator.failed())
        stream = mine.generator.generate(replace(case_of(mine).request, sampling=LONG), [lease])
        async with asyncio.timeout(DEADLINE_S):
            await anext(stream)
        assert not failed.done()
        lease.release()
        os.kill(mine.running._processes[0].pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(EngineLostError, match="SGLang"):
                await failed
            with pytest.raises(EngineLostError, match="SGLang"):
                async for _ in stream:
                    pass
        assert mine.cache.statistics().leased_entries == 0
        with mine.lease(mine.encode(cards()[1])) as other, pytest.raises(EngineLostError):
            await told(mine, other)
    finally:
        mine.encoder.close()
        await mine.generator.close()
        mine.cache.close()
    assert [file for file in files if file.exists()] == []
