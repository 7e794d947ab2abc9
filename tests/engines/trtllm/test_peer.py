"""The peer refuses what the real engine refuses: else the tests over it would show little."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines.contract import chat_case, pictures
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.engines.trtllm.handles import cpu_handle

HASH = list(range(8))


@pytest.fixture
def handed(qwen: TrtllmHalves, peer: Any) -> dict[str, Any]:
    """What a correct request for one image hands over, each handle new."""
    (lease,) = qwen.carry(pictures(1))
    case = chat_case(qwen.model_dir, pictures(1))
    prepared = qwen.generator._prepare(case.request, [lease])
    params = prepared.arguments["disaggregated_params"]
    return {name: getattr(params, name) for name in params.__slots__}


def prompt_of(qwen: TrtllmHalves) -> dict[str, str]:
    return {"prompt": chat_case(qwen.model_dir, pictures(1)).prompt}


@pytest.mark.parametrize(
    "hashes", [[HASH[:7]], [[*HASH, 8]], [tuple(HASH)], [["0"] * 8], [[2**31, *HASH[1:]]], [HASH, HASH], []]
)
def test_a_hash_is_eight_int32_in_a_list_and_one_for_each_handle(peer: Any, hashes: Any) -> None:
    from tensorrt_llm.llmapi import DisaggregatedParams

    with pytest.raises(AssertionError):
        DisaggregatedParams(multimodal_embedding_handles=[{}], multimodal_hashes=hashes)


def test_unknown_keywords_are_refused(peer: Any, qwen: TrtllmHalves) -> None:
    from tensorrt_llm.llmapi import DisaggregatedParams

    with pytest.raises(TypeError):
        DisaggregatedParams(embedding_handles=[])
    with pytest.raises(TypeError):
        peer.SamplingParams(max_new_tokens=3)
    with pytest.raises(TypeError):
        qwen.generator._llm.generate_async({"prompt": "x"}, salt="x")
    with pytest.raises(ValueError, match="LLM got invalid argument: multimodal_embedding_cache_capacity_gb"):
        peer.LLM(str(qwen.model_dir), multimodal_embedding_cache_capacity_gb=1)


async def test_the_same_params_twice_are_refused(
    qwen: TrtllmHalves, handed: dict[str, Any], peer: Any
) -> None:
    from tensorrt_llm.llmapi import DisaggregatedParams

    params = DisaggregatedParams(**handed)
    llm = qwen.generator._llm
    await llm.generate_async(prompt_of(qwen), disaggregated_params=params).aresult()
    with pytest.raises(ValueError, match="DisaggregatedParams serves one request only"):
        llm.generate_async(prompt_of(qwen), disaggregated_params=params)
    with pytest.raises(ValueError, match="dict serves one request only"):
        llm.generate_async(prompt_of(qwen), disaggregated_params=DisaggregatedParams(**handed))


@pytest.mark.parametrize(
    ("change", "inputs", "error"),
    [
        ({"request_type": None}, {}, ValueError),
        ({"request_type": "generation_only"}, {}, ValueError),
        ({"mrope_position_deltas_handle": None}, {}, RuntimeError),
        ({}, {"prompt": "no placeholder"}, ValueError),
        ({}, {"prompt": "<|image_pad|><|image_pad|>"}, ValueError),
        ({}, {"prompt": ""}, ValueError),
        ({}, {"prompt_text": "x"}, KeyError),
    ],
    ids=["no type", "decode only", "one of two", "none", "two", "no text", "unknown input"],
)
async def test_a_request_that_the_real_engine_refuses(
    qwen: TrtllmHalves, handed: dict[str, Any], change: dict[str, Any], inputs: dict[str, Any], error: Any
) -> None:
    from tensorrt_llm.llmapi import DisaggregatedParams

    params = DisaggregatedParams(**handed | change)
    with pytest.raises(error):
        qwen.generator._llm.generate_async(prompt_of(qwen) | inputs, disaggregated_params=params)


@pytest.mark.parametrize("missing", [True, False], ids=["none", "too short"])
async def test_positions_that_do_not_fit_fail_in_the_executor(
    qwen: TrtllmHalves, handed: dict[str, Any], missing: bool
) -> None:
    from tensorrt_llm.executor.utils import RequestError
    from tensorrt_llm.llmapi import DisaggregatedParams

    kept = torch.zeros(3, 1, 5, dtype=torch.int64)
    ids = None if missing else cpu_handle(Handle.of(kept, openers=1))
    deltas = None if missing else handed["mrope_position_deltas_handle"]
    params = DisaggregatedParams(
        **handed | {"mrope_position_ids_handle": ids, "mrope_position_deltas_handle": deltas}
    )
    with pytest.raises(RequestError, match="positions"):
        await qwen.generator._llm.generate_async(prompt_of(qwen), disaggregated_params=params).aresult()
