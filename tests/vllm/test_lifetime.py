"""How long an embedding is leased, and what vLLM's workers may read: never another image's bytes.

The demo model tells where the cross is, so an answer shows which image it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.engines.contract import Case, chat_case
from tests.engines.decoding import until
from tests.engines.with_tower import GREEDY
from tests.vllm.engine import Engine
from tests.vllm.models import CARD
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.errors import GenerationError

pytestmark = pytest.mark.parametrize("engine", ["demo"], indirect=True)

QUESTION = SamplingParams(max_tokens=12)
FIRST, TURNED = "top right", "bottom left"


def cards() -> tuple[Image.Image, Image.Image]:
    """Return the card and the same turned upside down."""
    card = Image.open(CARD).convert("RGB")
    return card, card.transpose(Image.Transpose.ROTATE_180)


def case_of(engine: Engine) -> Case:
    return chat_case(engine.model_dir, [cards()[0]], ["", "Where is the yellow cross?"])


async def told(engine: Engine, lease: Any, sampling: SamplingParams = QUESTION) -> str:
    """Return what the model says of an embedding."""
    answer = await engine.answer(case_of(engine).request, [lease], sampling)
    return engine.generator._check.expander._decode(list(answer.tokens)).removesuffix("<|im_end|>")


@pytest.fixture
def slow(engine: Engine) -> Iterator[Any]:
    """Loads take until `slow.unlink()`."""
    (engine.folder / "loading").unlink(missing_ok=True)
    file = engine.folder / "slow"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def overwrite(lease: Lease, other: Lease) -> None:
    """Do to a lease's extent what its next owner would."""
    lease.tensor.copy_(other.tensor)


async def test_the_answer_is_true(engine: Engine) -> None:
    for card, place in zip(cards(), (FIRST, TURNED), strict=True):
        with engine.lease(engine.encode(card)) as lease:
            assert await told(engine, lease) == place


async def test_bytes_that_change_after_the_end_change_no_answer(engine: Engine) -> None:
    """vLLM keeps the embedding by its key: a view there would now be the other image."""
    first, turned = (engine.lease(engine.encode(card)) for card in cards())
    assert await told(engine, first) == FIRST
    overwrite(first, turned)
    assert await engine.generator._llm.reset_prefix_cache()
    assert await told(engine, first) == FIRST, "from vLLM's own encoder cache"
    await engine.forget()
    assert await told(engine, first) == TURNED, "control: a load would have read the other image"
    first.release()
    turned.release()


async def test_an_aborted_request_keeps_its_lease_until_its_load_has_ended(engine: Engine, slow: Any) -> None:
    first, turned = (engine.lease(engine.encode(card)) for card in cards())
    key, held = first.key, engine.cache.statistics
    request = replace(case_of(engine).request, sampling=QUESTION)
    answering = asyncio.create_task(anext(engine.generator.generate(request, [first])))
    await until((engine.folder / "loading").exists)
    turned.release()
    first.release()
    answering.cancel()
    await asyncio.sleep(0)
    assert held().leased_entries == 1, "the worker is in the middle of its load"
    slow.unlink()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert held().leased_entries == 0
    # Now the extent may become another image's; what was loaded of it was whole.
    again, other = engine.cache.lease(key), engine.lease(engine.encode(cards()[1]))
    assert again is not None
    overwrite(again, other)
    assert await told(engine, again) == FIRST
    again.release()
    other.release()


async def test_two_requests_for_one_embedding_and_the_first_leaves(engine: Engine, slow: Any) -> None:
    lease = engine.lease(engine.encode(cards()[0]))
    request = replace(case_of(engine).request, sampling=QUESTION)
    leaving = asyncio.create_task(anext(engine.generator.generate(request, [lease])))
    await until((engine.folder / "loading").exists)
    staying = asyncio.create_task(told(engine, lease))
    leaving.cancel()
    slow.unlink()
    assert await staying == FIRST
    with pytest.raises(asyncio.CancelledError):
        await leaving
    lease.release()


async def test_a_load_that_fails_costs_its_request_alone(engine: Engine) -> None:
    """Zeros must stand in for no one: not for the request, and not for later ones with the same key."""
    lease = engine.lease(engine.encode(cards()[0]))
    nowhere = replace(lease.handle(), file=b"/torch_0_0_nowhere")
    lost = SimpleNamespace(
        key=lease.key,
        shape=lease.shape,
        dtype=lease.dtype,
        metadata=lease.metadata,
        handle=lambda: nowhere,
        clone=lease.clone,
    )
    lost.clone = lambda: SimpleNamespace(handle=lambda: nowhere, release=lambda: None)
    others = asyncio.create_task(told(engine, engine.lease(engine.encode(cards()[1]))))
    with pytest.raises(GenerationError, match="could not be loaded"):
        await told(engine, lost, replace(GREEDY, max_tokens=200))
    assert await others == TURNED
    assert await told(engine, lease) == FIRST
    lease.release()


async def test_many_leave_and_nothing_stays_leased(engine: Engine) -> None:
    leases = [engine.lease(engine.encode(card)) for card in cards()]
    request = replace(case_of(engine).request, sampling=replace(GREEDY, max_tokens=200))
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
    assert engine.generator._llm.output_processor.get_num_unfinished_requests() == 0
