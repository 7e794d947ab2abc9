"""vLLM under our generator, a transformers tower, and a cache between them."""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.answers import Answer
from tests.engines.contract import Case
from tests.engines.with_tower import EngineWithTower
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder
from trtllm_mm_cache.engines.vllm import VllmEngineArgs, VllmGenerator, support
from trtllm_mm_cache.engines.vllm.outputs import deltas_of, prompt_logprobs_of

START_DEADLINE_S = 240
DEADLINE_S = 90
SMALL = {"enforce_eager": True, "max_model_len": 1024, "max_num_batched_tokens": 96, "max_num_seqs": 4}
"""96 tokens a step: a prompt of a few hundred is computed in several, with images on the edges."""


@dataclass
class Engine(EngineWithTower):
    """One model. `folder` is where the watched connector writes.

    `rounding` is how far a log probability may lie from another tower's; what is another image's is further.
    """

    deadline_s = DEADLINE_S
    generator: VllmGenerator
    folder: Path
    rounding: float

    async def from_pixels(
        self, case: Case, *, adapter: str | None = None, **asked: Any
    ) -> tuple[Answer, list[torch.Tensor]]:
        """Return what vLLM answers by itself, from pixels, and what its own tower made of each image.

        `asked` are more of its own sampling parameters.
        """
        from vllm import SamplingParams as VllmSamplingParams

        names = [f"pixels-{uuid.uuid4().hex}" for _ in case.images]
        prompt = {
            "prompt_token_ids": list(case.request.token_ids),
            "multi_modal_data": {"image": list(case.images)},
            "multi_modal_uuids": {"image": names},
        }
        asked = {"max_tokens": 8, "temperature": 0, "logprobs": 20, "ignore_eos": True, **asked}
        sampling = VllmSamplingParams(**asked)
        async with asyncio.timeout(DEADLINE_S):
            name = names[0] if names else "text"
            lora = self.generator._adapter(adapter)
            async for output in self.generator._llm.generate(prompt, sampling, name, lora_request=lora):
                last = output
        of_prompt = asked.get("prompt_logprobs")
        told = None if of_prompt is None else prompt_logprobs_of(last, of_prompt)
        (delta,) = deltas_of(last, 20)
        answer = Answer(
            delta.token_ids, delta.logprobs, delta.finish_reason, delta.prompt_tokens, prompt_logprobs=told
        )
        return answer, [torch.load(self.folder / f"{name}.pt") for name in names]

    async def forget(self) -> None:
        """Empty vLLM's own caches, so that only handles can answer."""
        await self.generator._llm.reset_encoder_cache()
        await self.generator._llm.reset_prefix_cache()


def start_generator(model_dir: Path, folder: Path, *, tower: bool, **settings: Any) -> VllmGenerator:
    """Start vLLM under watch, as it is served or with a `tower` of its own besides. Blocking."""
    os.environ["WATCHED_FOLDER"] = str(folder)
    given = support.engine_arguments

    def watched(*arguments: Any) -> dict[str, Any]:
        made = given(*arguments)
        if tower:
            made.pop("limit_mm_per_prompt", None)
        connector = made["ec_transfer_config"]
        connector.ec_connector, connector.ec_connector_module_path = "WatchedConnector", "tests.vllm.watched"
        return made | {"worker_extension_cls": "tests.vllm.watched.WatchedExtension"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "engine_arguments", watched)
        return VllmGenerator(model_dir, VllmEngineArgs.model_validate(SMALL | settings))


def start(model_dir: Path, folder: Path, **settings: Any) -> Engine:
    """Start both halves of a model, the embedding in vLLM's dtype. Blocking.

    vLLM has its tower, for `from_pixels`; `test_without_tower.py` has it as it is served.
    """
    generator = start_generator(model_dir, folder, tower=True, **settings)
    dtype = VllmEngineArgs.model_validate(SMALL | settings).resolved_dtype(model_dir)
    tower = TransformersEngineArgs(device="cpu", embedding_dtype=dtype)
    # A half type has steps of 1/64 at the log probabilities of unlikely tokens.
    rounding = 1e-3 if dtype == "float32" else 0.1
    return Engine(model_dir, generator, TransformersVisionEncoder(model_dir, tower), folder, rounding)
