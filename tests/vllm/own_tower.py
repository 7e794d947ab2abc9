"""vLLM with its own tower, our cache and the misses' way between them; HTTP and Dynamo are left out."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tests.engines.contract import Case
from tests.engines.with_tower import GREEDY
from tests.tiers.own_tower_bench import TowerBench
from tests.vllm.engine import DEADLINE_S, SMALL, Answer
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.vllm import VllmEngineArgs, VllmOwnTowerGenerator
from trtllm_mm_cache.engines.vllm.outputs import deltas_of
from trtllm_mm_cache.tiers.filling import HeldFilling


@dataclass
class Aggregated:
    """One model, whole, and a cache of `bench.capacity` bytes."""

    model_dir: Path
    generator: VllmOwnTowerGenerator
    bench: TowerBench

    async def find(self, images: Sequence[Image.Image]) -> list[Lease | HeldFilling]:
        """Return what a request about these images gets for them."""
        filling = set[str]()
        found: list[Lease | HeldFilling] = []
        for image in images:
            item = self.bench.item(png(image), filling=filling)
            hit = self.bench.cache.lease(item.key.hex)
            found.append(hit or (await self.bench.tower.find(item, self.bench.loading))[0])
        return found

    async def answer(
        self,
        case: Case,
        sampling: SamplingParams = GREEDY,
        held: Sequence[Lease | HeldFilling] | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """Answer as a PD worker does; `held` in the place of what the case's images get."""
        leases = await self.find(case.images) if held is None else held
        deltas = []
        request = replace(case.request, sampling=sampling, lora_name=adapter)
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                aclosing(self.generator.generate(request, leases)) as stream,
            ):
                async for delta in stream:
                    deltas.append(delta)
                    for each in leases:
                        if isinstance(each, HeldFilling):
                            each.first_token()
        finally:
            for each in leases:
                each.release()
            await self.bench.settled()
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        logprobs = tuple(place for delta in deltas for place in delta.logprobs)
        return Answer(tokens, logprobs, deltas[-1].finish_reason, deltas[-1].prompt_tokens)

    async def alone(self, case: Case, adapter: str | None = None) -> Answer:
        """Return what vLLM answers by itself, from pixels, with its own caches empty before and after."""
        from vllm import SamplingParams as VllmSamplingParams

        await self.forget()
        prompt: Any = {
            "prompt_token_ids": list(case.request.token_ids),
            "multi_modal_data": {"image": list(case.images)},
        }
        sampling = VllmSamplingParams(max_tokens=8, temperature=0, logprobs=20, ignore_eos=True)
        async with asyncio.timeout(DEADLINE_S):
            lora = self.generator._adapter(adapter)
            async for output in self.generator._llm.generate(prompt, sampling, "alone", lora_request=lora):
                last = output
        await self.forget()
        (delta,) = deltas_of(last, 20)
        return Answer(delta.token_ids, delta.logprobs, delta.finish_reason, delta.prompt_tokens)

    async def forget(self) -> None:
        """Empty vLLM's own caches, so that only ours can answer."""
        await self.generator._llm.reset_encoder_cache()
        await self.generator._llm.reset_prefix_cache()


def png(image: Image.Image) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def start(model_dir: Path, *, capacity: int, kept: bool = True, **settings: Any) -> Aggregated:
    """Start vLLM. Blocking."""
    args = VllmEngineArgs.model_validate(SMALL | {"dtype": "float32"} | settings)
    generator = VllmOwnTowerGenerator(model_dir, args, kept=kept)
    return Aggregated(model_dir, generator, TowerBench(capacity, generator))


async def end(aggregated: Aggregated) -> None:
    """Stop it; nothing may be left of any request."""
    await aggregated.bench.settled()
    await aggregated.bench.tower.close()
    await aggregated.generator.close()
    statistics = aggregated.bench.cache.statistics()
    assert (statistics.reservations, statistics.leased_entries) == (0, 0)
    aggregated.bench.cache.check_integrity()
    aggregated.bench.cache.close()
