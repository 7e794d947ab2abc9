"""Reading answers, and counting what the model computes, for the tests of the generator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.engines.conftest import Halves
from tests.engines.contract import chat_case
from trtllm_mm_cache.engines.base import (
    FinishReason,
    GenerationRequest,
    PlaceLogprobs,
    SamplingParams,
    TokenDelta,
)

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    tokens: list[int]
    finish_reason: FinishReason | None
    deltas: int
    logprobs: list[PlaceLogprobs] = field(default_factory=list)


async def read(stream: AsyncGenerator[TokenDelta, None]) -> Answer:
    """Read an answer to its end."""
    tokens: list[int] = []
    logprobs: list[PlaceLogprobs] = []
    deltas = 0
    finish_reason = None
    async with asyncio.timeout(DEADLINE_S):
        async for delta in stream:
            assert finish_reason is None, "a delta came after the last"
            assert delta.token_ids or delta.finish_reason != "stop", "the end token came without its reason"
            tokens += delta.token_ids
            logprobs += delta.logprobs
            finish_reason = delta.finish_reason
            deltas += 1
    return Answer(tokens, finish_reason, deltas, logprobs)


def text_request(halves: Halves, text: str = "Hello, what is this?", **sampling: Any) -> GenerationRequest:
    """Return a request without images; answers do not end by themselves unless `ignore_eos` is False."""
    parameters = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **sampling})
    return replace(chat_case(halves.model_dir, [], [text]).request, sampling=parameters)


async def ask(halves: Halves, **sampling: Any) -> Answer:
    """Answer the standard text prompt."""
    return await read(halves.generator.generate(text_request(halves, **sampling), []))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; fail after `DEADLINE_S`."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


class TokenCount:
    """How many tokens all models together have computed logits for."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self.value = 0

    def __call__(self, module: torch.nn.Module, _inputs: object, output: object) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == self._vocabulary:
            with self._lock:
                self.value += 1


@contextmanager
def counting_tokens(vocabulary: int) -> Iterator[TokenCount]:
    """Count calls of output layers with `vocabulary` outputs while the block runs."""
    count = TokenCount(vocabulary)
    handle = register_module_forward_hook(count)
    try:
        yield count
    finally:
        handle.remove()


async def together(awaitables: Sequence[Awaitable[Answer]]) -> list[Answer]:
    """Run several answers at once."""
    return list(await asyncio.gather(*awaitables))
