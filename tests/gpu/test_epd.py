"""The contract over the real engine, in the order of upstream's own E/PD test.

Upstream: `LLM`, then `MultimodalEncoder(max_batch_size=1).generate`, its params with
request_type="context_and_generation" into `LLM.generate`; exact text, token ids and log-probabilities
(tests/unittest/_torch/multimodal/test_mm_encoder_standalone.py). Here the embedding takes the cache's way
in between.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.engines.contract import chat_case, picture, pictures
from tests.engines.decoding import read
from tests.gpu.conftest import MODELS, model_dir_of
from tests.gpu.halves import GpuHalves
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.checks import grid_of
from trtllm_mm_cache.engines.trtllm.handles import cpu_handle
from trtllm_mm_cache.engines.trtllm.mrope import mrope_positions


def images_for(halves: GpuHalves) -> int:
    return 1 if "llava" in halves.model_dir.name else 3


def test_upstreams_own_sequence_holds_here(halves: GpuHalves) -> None:
    """If this fails, the installation is at fault and what follows shows nothing."""
    from tensorrt_llm import SamplingParams as EngineSampling

    case = chat_case(halves.model_dir, pictures(1))
    inputs = [{"prompt": case.prompt, "multi_modal_data": {"image": list(case.images)}}]
    params = halves.encoder._encoder.generate(inputs)[0].disaggregated_params
    params.request_type = "context_and_generation"
    sampling = EngineSampling(max_tokens=64, top_k=1, logprobs=1)
    (result,) = halves.llm.generate(inputs, sampling_params=sampling, disaggregated_params=params)
    assert tuple(result.outputs[0].token_ids) == halves.whole(case).token_ids


def test_through_the_cache_text_tokens_and_logprobs_are_exactly_the_engines_own(halves: GpuHalves) -> None:
    case = chat_case(halves.model_dir, pictures(images_for(halves)))
    expected = halves.whole(case)
    leases = halves.carry(case.images)
    assert halves.by_handle(case, leases) == expected, "miss"
    assert halves.by_handle(case, leases) == expected, "hit"


def test_another_image_gives_another_answer(halves: GpuHalves) -> None:
    case = chat_case(halves.model_dir, pictures(1))
    right, wrong = halves.carry([case.images[0], picture(77, 640, 320)])
    assert halves.by_handle(case, [right]).logprobs != halves.by_handle(case, [wrong]).logprobs


async def test_the_generator_streams_the_same_tokens(halves: GpuHalves) -> None:
    case = chat_case(halves.model_dir, pictures(images_for(halves)))
    leases = halves.carry(case.images)
    request = replace(case.request, sampling=SamplingParams(max_tokens=64))
    answer = await read(halves.generator.generate(request, leases))
    assert tuple(answer.tokens) == halves.by_handle(case, leases).token_ids
    assert answer.deltas > 1


async def test_a_cancelled_answer_ends_in_the_engine_too(halves: GpuHalves) -> None:
    case = chat_case(halves.model_dir, pictures(1))
    (lease,) = halves.carry(case.images)
    request = replace(case.request, sampling=SamplingParams(max_tokens=2000, ignore_eos=True))
    stream = halves.generator.generate(request, [lease])
    await anext(stream)
    await stream.aclose()
    assert not halves.generator._ending, "the engine must say that the aborted request has ended"


def test_positions_are_the_engines_own(halves: GpuHalves) -> None:
    if not halves.generator._prepare.architecture.has_mrope:
        pytest.skip("one position axis")
    case = chat_case(halves.model_dir, pictures(3))
    leases = halves.carry(case.images)
    layout = halves.generator._prepare.layout
    grids = [grid_of(lease.metadata, lease.shape[0], layout.merge_size) for lease in leases]
    prompt = halves.generator._prepare.reader.read(case.request, 3)
    ours = mrope_positions(prompt.token_ids, layout.image_token_id, grids, layout.merge_size)
    rows = iter(lease.shape[0] for lease in leases)
    expanded = [
        token
        for one in prompt.token_ids
        for token in [one] * (next(rows) if one == layout.image_token_id else 1)
    ]
    ids = torch.tensor([expanded])
    theirs = halves.llm.input_processor.get_mrope_config(
        ids, torch.tensor(grids), None, torch.ones_like(ids), None
    )
    assert torch.equal(torch.from_numpy(ours.position_ids), theirs["mrope_position_ids"].long())
    assert ours.delta == theirs["mrope_position_deltas"].item()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_handles_have_the_engines_layout(halves: GpuHalves) -> None:
    from tensorrt_llm._torch.shared_tensor import SharedTensorContainer

    (lease,) = halves.carry(pictures(1))
    start = lease.offset // lease.dtype.itemsize
    shared = torch.empty(0, dtype=lease.dtype).set_(halves.cache.arena.storage, start, lease.shape)
    theirs = SharedTensorContainer.from_tensor(shared).dump_to_dict()
    assert cpu_handle(lease.handle(openers=1)) == theirs


def test_shared_kv_blocks_do_not_mix_images_up() -> None:
    """The same text and images of the same size, with block reuse on: the content's hash keeps them apart."""
    halves = GpuHalves.load(
        model_dir_of(MODELS[-1]),
        kv_cache_config={"enable_block_reuse": True, "free_gpu_memory_fraction": 0.2},
    )
    try:
        case = chat_case(halves.model_dir, [picture(1, 512, 512)])
        first, second = halves.carry([picture(1, 512, 512), picture(2, 512, 512)])
        answers = [halves.by_handle(case, [lease]) for lease in (first, second, first, second)]
        assert answers[0].logprobs != answers[1].logprobs
        assert [answer.token_ids for answer in answers[2:]] == [answer.token_ids for answer in answers[:2]]
    finally:
        halves.close()


def test_two_ranks_open_the_same_handles() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    name = MODELS[-1]
    halves = GpuHalves.load(model_dir_of(name), tensor_parallel_size=2)
    try:
        case = chat_case(halves.model_dir, pictures(3))
        leases = halves.carry(case.images)
        for _ in range(20):
            assert halves.by_handle(case, leases).token_ids == halves.whole(case).token_ids
    finally:
        halves.close()
