"""Requests to the adapter and their answers, for the tests over the peer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.engines.contract import Case
from tests.engines.decoding import Answer, read
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import GenerationRequest, SamplingParams

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=24, ignore_eos=True, temperature=20.0, seed=20261124)
"""Drawn at a heat at which the whole distribution of every step decides: tells more than greedy tokens."""


def is_llava(halves: TrtllmHalves) -> bool:
    return halves.model_dir.name == "llava_next"


def request_of(case: Case, sampling: SamplingParams) -> GenerationRequest:
    return replace(case.request, sampling=sampling)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def answer_of(
    halves: TrtllmHalves, case: Case, sampling: SamplingParams, leases: Sequence[Lease]
) -> Answer:
    return await read(halves.generator.generate(request_of(case, sampling), leases))
