"""One arm of `vllm.py`, in a process of its own: an engine, images that are new to it, and the same again."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.encoding import CachedTower
from benchmarks.vllm_measurement import IN_FLIGHT, Measurement
from benchmarks.vllm_model import SIDE
from benchmarks.vllm_watch import count_images, images_encoded
from tests.engines.contract import chat_case
from trtllm_mm_cache.cache.key import content_digest
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.engines.vllm import VllmEngineArgs, VllmGenerator, VllmOwnTowerGenerator
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.settings import ImageLimits

FOLDER_VARIABLE = "DYNAMO_CONNECTOR_FOLDER"
"""Where the arm `dynamo` finds ai-dynamo."""

CAPACITY = 1 << 30
QUESTION = ["", "What is it?"]
ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": IN_FLIGHT,
    "enable_prefix_caching": False,
}
"""No prefix cache, and vLLM's encoder cache is emptied before each hit: else these would answer hits."""


class Plain:
    """Asks a vLLM by its own way: its processor, and an image named by its content, as our key does."""

    def __init__(self, model: Path, llm: Any) -> None:
        self.llm = llm
        self._prompt = chat_case(model, [Image.new("RGB", (64, 64))], QUESTION).request.token_ids

    async def ask(self, media: bytes) -> float:
        """See `Arm.ask`."""
        image = await asyncio.to_thread(decode_image, media, ImageLimits())
        name = content_digest(media).hex()
        return await self.run(
            {
                "prompt_token_ids": list(self._prompt),
                "multi_modal_data": {"image": [image]},
                "multi_modal_uuids": {"image": [name]},
            }
        )

    async def text(self, rows: int) -> float:
        """Ask with a text of as many tokens as the question about an image of so many rows has."""
        ids = np.random.default_rng(rows).integers(10, 200, len(self._prompt) - 1 + rows)
        return await self.run({"prompt_token_ids": [int(each) for each in ids]})

    async def run(self, prompt: Any) -> float:
        """See `Arm.ask`."""
        from vllm import SamplingParams as VllmSamplingParams

        sampling, first = VllmSamplingParams(max_tokens=1, temperature=0, ignore_eos=True), 0.0
        async for _ in self.llm.generate(prompt, sampling, uuid.uuid4().hex):
            first = first or time.perf_counter()
        return first


class Theirs(Plain):
    """vLLM with a connector that is not ours, or none."""

    def __init__(self, model: Path, connector: dict[str, Any] | None) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import ECTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        self.caches = connector is not None
        chosen = None if connector is None else ECTransferConfig(ec_role="ec_both", **connector)
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model), skip_mm_profiling=True, ec_transfer_config=chosen, seed=0, **ENGINE
            )
        )
        super().__init__(model, llm)

    async def encoded(self) -> int:
        """See `Arm.encoded`."""
        (images,) = await self.llm.collective_rpc(images_encoded)
        return int(images)


class Ours:
    """Our generator over vLLM; where a lease comes from, its subclasses say.

    `plain` asks the same engine past us, where it has a tower of its own.
    """

    caches = True
    plain: Plain | None = None

    def __init__(self, model: Path, generator: VllmGenerator) -> None:
        self.generator = generator
        self.llm = generator._llm
        request = chat_case(model, [Image.new("RGB", (64, 64))], QUESTION).request
        self.request = replace(request, sampling=SamplingParams(max_tokens=1, ignore_eos=True))

    async def _answer(self, held: Any, first_token: Callable[[], None]) -> float:
        first = 0.0
        async for _ in self.generator.generate(self.request, [held]):
            first = first or time.perf_counter()
            first_token()
        held.release()
        return first


class Aggregated(Ours):
    """vLLM's own tower fills our arena."""

    def __init__(self, model: Path) -> None:
        from tests.tiers.own_tower_bench import TowerBench

        generator = VllmOwnTowerGenerator(model, VllmEngineArgs.model_validate(ENGINE), kept=True)
        super().__init__(model, generator)
        self.plain = Plain(model, self.llm)
        self._tower = generator
        self._bench = TowerBench(CAPACITY, generator)  # type: ignore[arg-type]

    async def encoded(self) -> int:
        """See `Arm.encoded`."""
        return self._tower.encodes

    async def ask(self, media: bytes) -> float:
        """See `Arm.ask`."""
        probe_image(media, ImageLimits())
        item = self._bench.item(media)
        held = self._bench.cache.lease(item.key.hex)
        if held is not None:
            return await self._answer(held, lambda: None)
        missing, _ = await self._bench.tower.find(item, self._bench.loading)
        first = await self._answer(missing, missing.first_token)  # type: ignore[union-attr]
        await self._bench.settled()
        return first


class Disaggregated(Ours):
    """Transformers' tower encodes, in this process: of what NIXL and the hop cost `transfer.py` tells."""

    def __init__(self, model: Path) -> None:
        args = VllmEngineArgs.model_validate(ENGINE | {"encoder_dtype": "bfloat16"})
        super().__init__(model, VllmGenerator(model, args))
        self._tower = CachedTower(model, self.generator.fingerprint)

    async def encoded(self) -> int:
        """See `Arm.encoded`."""
        return self._tower.encoded

    async def ask(self, media: bytes) -> float:
        """See `Arm.ask`."""
        lease = self._tower.known(media) or await asyncio.to_thread(self._tower.lease, media)
        return await self._answer(lease, lambda: None)


async def measure(arm: Any, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured, by size."""
    await arm.llm.collective_rpc(count_images)
    measurement, found = Measurement(arm, plan["seed"]), {}
    await measurement.warmed()
    await arm.llm.reset_encoder_cache()
    for size, (width, height) in plan["sizes"].items():
        if name == "text":
            found[size] = await measurement.texts((width // SIDE) * (height // SIDE), plan["repeats"])
        else:
            found[size] = await measurement.images(width, height, plan["repeats"])
    return found


def make(name: str, model: Path, plan: dict[str, Any]) -> Any:
    """Start the engine of an arm. Blocking."""
    match name:
        case "vllm" | "text":
            return Theirs(model, None)
        case "example":
            connector = {
                "ec_connector": "ECExampleConnector",
                "ec_connector_extra_config": {"shared_storage_path": plan["shared"]},
            }
            return Theirs(model, connector)
        case "dynamo":
            connector = {
                "ec_connector": "DynamoOnCpu",
                "ec_connector_module_path": "benchmarks.vllm_dynamo",
                "ec_connector_extra_config": {"multimodal_embedding_cache_capacity_gb": CAPACITY / 2**30},
            }
            return Theirs(model, connector)
        case "aggregated":
            return Aggregated(model)
        case "disaggregated":
            return Disaggregated(model)
    raise SystemExit(f"no arm {name}")


def main() -> None:
    """Run one arm as the command line's JSON says, and print what was measured as the last line."""
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    arm = make(plan["arm"], Path(plan["model"]), plan)
    found = asyncio.run(measure(arm, plan["arm"], plan))
    arm.llm.shutdown()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
