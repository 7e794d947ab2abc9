"""What the tests have a worker compute: with one rank in their own process, with several in an mpirun job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tests.engines.conftest import Halves
from tests.engines.contract import Case, chat_case, picture, pictures, reference_processor
from tests.engines.decoding import Answer, read, text_request
from trtllm_mm_cache.cache.arena.region import SHARED_MEMORY_ROOT
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import Constraint, PlaceLogprobs, SamplingParams
from trtllm_mm_cache.errors import InvalidRequestError

ONE_THREAD = "torch_threads: 1\ndevice: cpu\n"
"""The engine's settings in all of these tests."""

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 12},
    {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 11},
    {"max_tokens": 12, "min_tokens": 12, "presence_penalty": 1.0, "repetition_penalty": 1.4, "logprobs": 2},
    {"max_tokens": 12, "temperature": 1.0, "min_p": 0.05, "seed": 2, "logit_bias": {9: 5.0}},
    {"max_tokens": 200, "temperature": 1.0, "seed": 5, "constraint": Constraint("regex", "[a-z]{8}")},
)


async def answers(halves: Halves) -> dict[str, Any]:
    """Return the logits and answers for prompts of 0, 1 and 2 images."""
    result: dict[str, Any] = {"logits": [], "answers": [], "stopped": [], "cancelled": [], "refused": []}
    for count in range(3):
        case = chat_case(halves.model_dir, pictures(count))
        leases = halves.carry(case.items(halves.generator.variant(count)))
        result["logits"].append(halves.generator.prefill_logits(case.request, leases))
        for sampling in SAMPLINGS:
            result["answers"].append(await _answer(halves, case, leases, **sampling))
        result["stopped"].append(await _stopped(halves, case, leases))
        result["cancelled"].append(await _cancelled(halves, case, leases))
        result["refused"].append(await _broken(halves, case, leases))
    return result | {"rewritten": _rewritten(halves)}


async def talk(halves: Halves) -> None:
    """Answer for ever; print "busy" when the first tokens are there."""
    while True:
        request = text_request(halves, max_tokens=2000)
        async for _ in halves.generator.generate(request, []):
            print("busy", flush=True)


async def _answer(halves: Halves, case: Case, leases: Sequence[Lease], **sampling: Any) -> Answer:
    request = replace(case.request, sampling=SamplingParams(**sampling))
    answer = await read(halves.generator.generate(request, leases))
    logprobs = [_rounded(place) for place in answer.logprobs]
    return replace(answer, deltas=0, logprobs=logprobs)  # how tokens are grouped is a matter of time


def _rounded(place: PlaceLogprobs) -> Any:
    """Several ranks add in another order."""
    tokens = (place.chosen, *place.likeliest)
    return [(token.token_id, round(token.logprob, 3)) for token in tokens]


async def _stopped(halves: Halves, case: Case, leases: Sequence[Lease]) -> Answer:
    """Answer with a stop string that comes up in the middle: only rank 0 can know."""
    whole = await _answer(halves, case, leases, max_tokens=30, ignore_eos=True)
    tokenizer = reference_processor(halves.model_dir).tokenizer
    stop = next(text for text in (tokenizer.decode([token]) for token in whole.tokens[5:]) if text.isascii())
    return await _answer(halves, case, leases, max_tokens=30, ignore_eos=True, stop=(stop,))


async def _cancelled(halves: Halves, case: Case, leases: Sequence[Lease]) -> bool:
    """Leave a long answer after its first tokens; true if that was in the middle of it."""
    sampling = SamplingParams(max_tokens=2000, ignore_eos=True)
    stream = halves.generator.generate(replace(case.request, sampling=sampling), leases)
    first = await anext(stream)
    async with asyncio.timeout(10):
        await stream.aclose()
    return first.finish_reason is None


async def _broken(halves: Halves, case: Case, leases: Sequence[Lease]) -> bool:
    """Ask for what the grammar cannot follow; true if it is refused and the ranks go on."""
    try:
        await _answer(halves, case, leases, max_tokens=4, constraint=Constraint("regex", "("))
    except InvalidRequestError:
        return True
    return False


def _rewritten(halves: Halves) -> list[Any]:
    """Return logits of a picture, of another, and of the first one's lease with the other's bytes."""
    case = chat_case(halves.model_dir, [picture(5, 112, 112)])
    (item,) = case.items(halves.generator.variant(1))
    lease, other = halves.carry([item, replace(item, image=picture(6, 112, 112))])
    logits = [halves.generator.prefill_logits(case.request, [held]) for held in (lease, other)]
    lease.tensor.copy_(other.tensor)
    return [*logits, halves.generator.prefill_logits(case.request, [lease])]


def shared_mappings(pid: int) -> Iterator[tuple[range, str]]:
    """Yield the address range and the path of each of torch's shared-memory files that a process maps."""
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            addresses, _, _, _, _, *path = line.split()
            if path and path[0].startswith(f"{SHARED_MEMORY_ROOT}/torch_"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                yield range(start, end), path[0]


def shared_resident_bytes(pid: int) -> int:
    """Return a process's part of the resident shared memory: each page counts once over all processes."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as sums:
        return next(1024 * int(line.split()[1]) for line in sums if line.startswith("Pss_Shmem:"))
