"""One arm of `vllm.py`, in a process of its own: an engine, images that are new to it, and the same again."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from tests.engines.contract import chat_case
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodeItem, SamplingParams
from trtllm_mm_cache.engines.vllm import VllmEngineArgs, VllmGenerator, VllmOwnTowerGenerator
from trtllm_mm_cache.media import decode_image, probe_image
from trtllm_mm_cache.settings import ImageLimits

FOLDER_VARIABLE = "DYNAMO_CONNECTOR_FOLDER"
"""Where the arm `dynamo` finds ai-dynamo."""

CAPACITY = 1 << 30
CONCURRENT = 8
QUESTION = ["", "What is it?"]
ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": CONCURRENT,
    "enable_prefix_caching": False,
}
"""No prefix cache, and vLLM's encoder cache is emptied before each hit: else these would answer hits."""


class Arm(Protocol):
    """Answers one token about an image's file. `llm` is vLLM."""

    llm: Any

    async def ask(self, media: bytes) -> None:
        """Return when the first token is there."""
        ...


def noise(seed: int, width: int, height: int) -> bytes:
    """Return the PNG of an image like no other."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


class Theirs:
    """vLLM with its own processor and a connector that is not ours, or none."""

    def __init__(self, model: Path, connector: dict[str, Any] | None) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import ECTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        chosen = None if connector is None else ECTransferConfig(ec_role="ec_both", **connector)
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model), skip_mm_profiling=True, ec_transfer_config=chosen, seed=0, **ENGINE
            )
        )
        self._prompt = chat_case(model, [Image.new("RGB", (64, 64))], QUESTION).request.token_ids

    async def ask(self, media: bytes) -> None:
        """See `Arm.ask`. The image is named by its content, as our key does."""
        image = await asyncio.to_thread(decode_image, media, ImageLimits())
        name = content_digest(media).hex()
        await self.run(
            {
                "prompt_token_ids": list(self._prompt),
                "multi_modal_data": {"image": [image]},
                "multi_modal_uuids": {"image": [name]},
            }
        )

    async def text(self, tokens: int) -> None:
        """Ask with a text of so many tokens."""
        ids = np.random.default_rng(tokens).integers(10, 200, tokens)
        await self.run({"prompt_token_ids": [int(each) for each in ids]})

    async def run(self, prompt: Any) -> None:
        """Return when the first token is there."""
        from vllm import SamplingParams as VllmSamplingParams

        sampling = VllmSamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        async for _ in self.llm.generate(prompt, sampling, uuid.uuid4().hex):
            pass


class Ours:
    """Our generator over vLLM; where a lease comes from, its subclasses say."""

    def __init__(self, model: Path, generator: VllmGenerator) -> None:
        self._model = model
        self.generator = generator
        self.llm = generator._llm
        self.cache = MultimodalEmbeddingCacheManager(CAPACITY)
        request = chat_case(model, [Image.new("RGB", (64, 64))], QUESTION).request

        self.request = replace(request, sampling=SamplingParams(max_tokens=1, ignore_eos=True))

    async def _answer(self, held: Any, first_token: Callable[[], None]) -> None:
        async for _ in self.generator.generate(self.request, [held]):
            first_token()
        held.release()


class Aggregated(Ours):
    """vLLM's own tower fills our arena."""

    def __init__(self, model: Path) -> None:
        from tests.tiers.own_tower_bench import TowerBench

        generator = VllmOwnTowerGenerator(model, VllmEngineArgs.model_validate(ENGINE), kept=True)
        super().__init__(model, generator)
        self.bench = TowerBench(CAPACITY, generator)

    async def ask(self, media: bytes) -> None:
        """See `Arm.ask`."""
        probe_image(media, ImageLimits())
        item = self.bench.item(media)
        held = self.bench.cache.lease(item.key.hex)
        if held is not None:
            await self._answer(held, lambda: None)
            return
        missing, _ = await self.bench.tower.find(item, self.bench.loading)
        await self._answer(missing, missing.first_token)  # type: ignore[union-attr]
        await self.bench.settled()


class Disaggregated(Ours):
    """Transformers' tower encodes, in this process: of what NIXL and the hop cost `transfer.py` tells."""

    def __init__(self, model: Path) -> None:
        from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

        args = VllmEngineArgs.model_validate(ENGINE | {"encoder_dtype": "bfloat16"})
        super().__init__(model, VllmGenerator(model, args))
        tower = TransformersEngineArgs(device="cpu", dtype="bfloat16", embedding_dtype="bfloat16")
        self._encoder = TransformersVisionEncoder(model, tower)

    async def ask(self, media: bytes) -> None:
        """See `Arm.ask`."""
        probe_image(media, ImageLimits())
        key = embedding_key(content_digest(media), fingerprint=self.generator.fingerprint).hex
        lease = self.cache.lease(key) or await asyncio.to_thread(self._encode, key, media)
        await self._answer(lease, lambda: None)

    def _encode(self, key: str, media: bytes) -> Lease:
        prepared = self._encoder.preprocess(EncodeItem(decode_image(media, ImageLimits())))
        (made,) = self._encoder.encode([prepared])
        tensor = made.tensor  # type: ignore[union-attr]
        reservation = self.cache.reserve(key, tensor.nbytes, owner="benchmark")
        reservation.write(tensor)
        return reservation.commit(
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            metadata=made.metadata,  # type: ignore[union-attr]
        )


async def timed(work: Awaitable[None]) -> float:
    """Return the milliseconds that it took."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1e3


async def measure(arm: Any, name: str, plan: dict[str, Any], first_seed: int) -> dict[str, Any]:
    """Return milliseconds to the first token and requests a second, by size."""
    found: dict[str, Any] = {}
    await arm.ask(noise(first_seed, 96, 96))
    for size, (width, height) in plan["sizes"].items():
        if name == "text":
            tokens = (width // 32) * (height // 32) + 20
            found[size] = {"hit": [await timed(arm.text(tokens)) for _ in range(plan["repeats"] + 1)][1:]}
            continue
        miss, hit = [], []
        media = [noise(first_seed + 1 + index, width, height) for index in range(plan["repeats"])]
        for each in media:
            miss.append(await timed(arm.ask(each)))
            await arm.llm.reset_encoder_cache()
            hit.append(await timed(arm.ask(each)))
            await arm.llm.reset_encoder_cache()
        seconds = await timed(asyncio.wait([asyncio.create_task(arm.ask(each)) for each in media * 2])) / 1e3  # type: ignore[arg-type]
        found[size] = {"miss": miss, "hit": hit, "hits_per_s": [2 * len(media) / seconds]}
        await arm.llm.reset_encoder_cache()
        first_seed += 1000
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
    found = asyncio.run(measure(arm, plan["arm"], plan, plan["seed"]))
    arm.llm.shutdown()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
