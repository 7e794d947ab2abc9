"""Aggregated: what vLLM's own tower makes lies in our cache, bit for bit, and answers as its pixels do.

A random model can be blind: each comparison has a control that must differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from PIL import Image

from tests.engines.contract import Case, chat_case, picture
from tests.vllm.engine import START_DEADLINE_S
from tests.vllm.models import CARD, DEMO, TINY, make_model
from tests.vllm.own_tower import Aggregated, end, start
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem, SamplingParams
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.tiers.filling import HeldFilling

CAPACITY = 1 << 20
QUICK = ("qwen3_vl",)
"""Deepstack, and a grid; the other architectures take minutes together."""


def model_params() -> list[object]:
    models = ("demo", *TINY)
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in models]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=model_params())
async def own(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Aggregated]:
    model_dir = DEMO
    if request.param != "demo":
        model_dir = await asyncio.to_thread(make_model, request.param, tmp_path_factory.mktemp(request.param))
    aggregated = await started(model_dir, CAPACITY)
    yield aggregated
    await end(aggregated)


async def started(model_dir: Path, capacity: int, **options: object) -> Aggregated:
    async with asyncio.timeout(2 * START_DEADLINE_S):
        return await asyncio.to_thread(lambda: start(model_dir, capacity=capacity, **options))  # type: ignore[arg-type]


def case_of(own: Aggregated, *seeds: int) -> Case:
    return chat_case(own.model_dir, [picture(seed, 160, 120) for seed in seeds])


async def test_misses_and_hits_answer_as_pixels_do_and_cost_one_encode(own: Aggregated) -> None:
    one, other = case_of(own, 1), case_of(own, 2)
    expected, different = await own.alone(one), await own.alone(other)
    assert different.differs(expected) > 1e-3, "control: the model sees"
    before = own.generator.encodes
    assert (await own.answer(one)).differs(expected) == 0, "a miss"
    assert (await own.answer(other)).differs(different) == 0
    assert own.generator.encodes - before == 2
    for _ in range(2):
        await own.forget()
        assert (await own.answer(one)).differs(expected) == 0, "a hit"
    assert own.generator.encodes - before == 2, "vLLM's own caches were empty: it was loaded"
    await own.forget()
    swapped = await own.find(other.images)
    assert (await own.answer(one, held=swapped)).differs(expected) > 1e-3, "control: what is loaded counts"


async def test_hits_and_misses_share_a_prompt(own: Aggregated) -> None:
    both = case_of(own, 11, 12)
    expected = await own.alone(both)
    await own.answer(case_of(own, 12))
    await own.forget()
    first, second = await own.find(both.images)
    assert isinstance(first, HeldFilling)
    assert isinstance(second, Lease)
    assert (await own.answer(both, held=[first, second])).differs(expected) == 0
    await own.forget()
    assert (await own.answer(case_of(own, 12, 11))).differs(expected) > 1e-3, "control: the other order"


async def test_an_entry_has_the_towers_bytes_and_every_column(own: Aggregated) -> None:
    """All deepstack levels lie in the row, and count: vLLM's rows are compared with transformers' tower's."""
    case = case_of(own, 21)
    await own.answer(case)
    (lease,) = await own.find(case.images)
    assert isinstance(lease, Lease)
    encoder = TransformersVisionEncoder(own.model_dir, TransformersEngineArgs(device="cpu"))
    images = [case.images[0], picture(22, 160, 120)]
    theirs, other = encoder.encode([encoder.preprocess(EncodeItem(image)) for image in images])
    assert isinstance(theirs, EncodedItem)
    assert isinstance(other, EncodedItem)
    with lease:
        assert lease.nbytes == theirs.tensor.nbytes
        assert lease.shape == tuple(theirs.tensor.shape)
        rounding = (lease.tensor - theirs.tensor).abs().max()
        print(f"{own.model_dir.name}: towers differ by {rounding:.2g} of {lease.tensor.abs().max():.2g}")
        another = (lease.tensor - other.tensor).abs().max()
        assert rounding < another / 10, "another image processor, another rounding; control: another image"
        assert lease.metadata.placeholder == theirs.metadata.placeholder
        assert lease.metadata.grid_thw == theirs.metadata.grid_thw


async def test_what_vllm_has_in_its_encoder_cache_is_kept_without_an_encode(own: Aggregated) -> None:
    case = case_of(own, 31)
    expected = await own.answer(case)
    (lease,) = await own.find(case.images)
    assert isinstance(lease, Lease)
    with lease:
        made = lease.tensor.clone()
    assert own.bench.cache.clear()
    before = own.generator.encodes
    assert (await own.answer(case)).differs(expected) < 1e-3
    assert own.generator.encodes == before
    (lease,) = await own.find(case.images)
    assert isinstance(lease, Lease)
    with lease:
        assert torch.equal(lease.tensor, made)
    assert own.bench.cache.clear()
    await own.forget()
    await own.answer(case)
    assert own.generator.encodes == before + 1
    assert own.bench.cache.statistics().entries == 1


async def test_a_request_that_is_cancelled_leaves_nothing_and_others_take_over(own: Aggregated) -> None:
    for seed in range(40, 48):
        case = case_of(own, seed)
        answering = [asyncio.create_task(own.answer(case)) for _ in range(4)]
        await asyncio.sleep(0.01 * (seed - 40))
        answering[0].cancel()
        await asyncio.wait(answering[:1])
        answers = await asyncio.gather(*answering[1:])
        assert all(answer.differs(answers[0]) < 1e-3 for answer in answers)
    await own.bench.settled()
    assert own.bench.cache.statistics().reservations == 0


async def test_more_rows_than_vllm_holds_are_refused_by_name(own: Aggregated) -> None:
    case = chat_case(own.model_dir, [picture(51, 160, 120)])
    (held,) = await own.find(case.images)
    limits = own.generator._prepare.limits
    object.__setattr__(limits, "rows", held.shape[0] - 1)
    try:
        with pytest.raises(InvalidRequestError, match="max_num_batched_tokens"):
            await own.answer(case, held=[held])
    finally:
        object.__setattr__(limits, "rows", held.shape[0] + 1000)
    assert own.bench.cache.statistics().reservations == 0


@pytest.mark.long
async def test_a_preempted_request_does_not_write_its_extent_again() -> None:
    """A small KV space: requests are preempted and their images encoded again."""
    small = {"num_gpu_blocks_override": 7, "block_size": 32, "max_model_len": 128}
    own = await started(DEMO, 8 * 6 * 128 * 4, max_num_seqs=8, **small)
    card = Image.open(CARD).convert("RGB")
    views = [card, card.transpose(Image.Transpose.ROTATE_180)]
    cases = [chat_case(own.model_dir, [view], ["", "Where is the yellow cross?"]) for view in views]
    asked = SamplingParams(max_tokens=60, ignore_eos=True)
    for number in range(4):
        answers = await asyncio.gather(*(own.answer(cases[index % 2], asked) for index in range(8)))
        for index, answer in enumerate(answers):
            text = own.generator._check.expander._decode(list(answer.tokens))
            assert text.startswith(("top right", "bottom left")[index % 2]), (number, index, text)
        assert own.bench.cache.clear() <= 2
        await own.forget()
    await end(own)


@pytest.mark.long
async def test_with_capacity_0_nothing_is_copied_out_and_answers_are_the_same(tmp_path: Path) -> None:
    own = await started(make_model("llava", tmp_path), 0, kept=False)
    assert own.generator._llm.vllm_config.ec_transfer_config.ec_connector_extra_config == {}
    case = case_of(own, 61)
    expected = await own.alone(case)
    for _ in range(2):
        await own.forget()
        assert (await own.answer(case)).differs(expected) == 0
    assert own.bench.tower.uncached == 2
    await end(own)
