"""SGLang under our generator, a transformers tower, and a cache between them."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.answers import Answer, collect
from tests.engines.contract import Case, reference_inputs, reference_model
from tests.engines.with_tower import EngineWithTower
from tests.sglang.models import LANGUAGE_PART
from trtllm_mm_cache.engines.base import (
    PlaceLogprobs,
    TokenLogprob,
)
from trtllm_mm_cache.engines.sglang import SglangEngineArgs, SglangGenerator
from trtllm_mm_cache.engines.sglang.outputs import delta_of
from trtllm_mm_cache.engines.sglang.processes import RunningEngine
from trtllm_mm_cache.engines.transformers import TransformersEngineArgs, TransformersVisionEncoder

START_DEADLINE_S = 560
DEADLINE_S = 180
SMALL = {
    "dtype": "float32",
    "device": "cpu",
    "context_length": 1024,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "chunked_prefill_size": 96,
}
"""96 tokens a step: a prompt of a few hundred is computed in several, with images on the edges."""

ROUNDING = 1e-3
"""How far a log probability may lie from another tower's; what is another image's is ten times further."""


@dataclass
class Engine(EngineWithTower):
    """One model."""

    deadline_s = DEADLINE_S
    generator: SglangGenerator

    @property
    def running(self) -> RunningEngine:
        """SGLang itself."""
        assert self.generator._engine is not None
        return self.generator._engine

    async def from_pixels(self, case: Case, new_tokens: int = 8) -> Answer:
        """Return what SGLang answers by itself, from pixels, by its own processor and its own tower.

        Of a model that it has no tower for, what transformers answers.
        """
        if self.model_dir.name in LANGUAGE_PART:
            return await asyncio.to_thread(reference_answer, case, new_tokens)
        await self.forget()
        sampling = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
        arguments = {
            "prompt": case.prompt,
            "image_data": list(case.images) or None,
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": 20,
            "stream": True,
        }
        manager, ours = self.running.manager, self.running.inputs
        manager.mm_processor = ours.processor
        try:
            async with asyncio.timeout(DEADLINE_S):
                stream = await self.running.generate(uuid.uuid4().hex, arguments)
                (answer,) = await collect(
                    delta async for output in stream if (delta := delta_of(output, 0, 20)) is not None
                )
        finally:
            manager.mm_processor = ours
        return answer

    async def forget(self) -> None:
        """Empty SGLang's own prefix cache, once it runs nothing: a request's end is told a little before."""
        assert (await self.running.manager.flush_cache(timeout_s=DEADLINE_S)).success


def reference_answer(case: Case, new_tokens: int) -> Answer:
    """Return what `generate(pixel_values)` of transformers answers, greedily and past any end."""
    inputs = reference_inputs(case)
    output = reference_model(case.model_dir).generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    tokens = tuple(output.sequences[0, prompt_tokens:].tolist())
    places = []
    for token, logits in zip(tokens, output.logits, strict=True):
        logprobs = logits[0].log_softmax(-1)
        values, ids = logprobs.topk(20)
        likeliest = tuple(map(TokenLogprob, ids.tolist(), values.tolist()))
        places.append(PlaceLogprobs(TokenLogprob(token, logprobs[token].item()), likeliest))
    return Answer(tokens, tuple(places), "length", prompt_tokens)


def start(model_dir: Path, **settings: Any) -> Engine:
    """Start both halves of a model, the embedding in SGLang's dtype. Blocking."""
    args = SglangEngineArgs.model_validate(SMALL | settings)
    generator = SglangGenerator(model_dir, args)
    tower = TransformersEngineArgs(device="cpu", embedding_dtype=args.resolved_dtype(model_dir))
    return Engine(model_dir, generator, TransformersVisionEncoder(model_dir, tower))
