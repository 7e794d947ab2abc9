"""Tokens from the thread that computes to the event loop that streams, and the end of an answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from trtllm_mm_cache.engines.base import FinishReason, PlaceLogprobs
from trtllm_mm_cache.engines.transformers.prepare import PreparedRequest
from trtllm_mm_cache.engines.transformers.sampling import ModelsLogprobs

Token = tuple[int, PlaceLogprobs | None]
"""A token, and the log probabilities at its place where the request asked for them."""


class TokenStream:
    """A queue of tokens with one writer, the computing thread, and one reader, a coroutine.

    Create it in the event loop that reads. `put` and `cancelled` are for the thread; `end` is the
    done callback of the thread's future and may run anywhere.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Token | Future[FinishReason]] = asyncio.Queue()
        self._outcome_follows = False
        self._cancelled = threading.Event()
        self._ended = asyncio.Event()

    @property
    def cancelled(self) -> bool:
        """True once the reader has left."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the thread to stop at its next token."""
        self._cancelled.set()

    def put(self, token: Token, *, last: bool) -> None:
        """Hand one token to the reader; after the `last` one only the outcome follows, and soon."""
        self._loop.call_soon_threadsafe(self._put, token, last)

    def _put(self, token: Token, last: bool) -> None:
        self._outcome_follows = last
        self._items.put_nowait(token)

    def end(self, work: Future[FinishReason]) -> None:
        """Hand the outcome to the reader; nothing may follow."""
        self._loop.call_soon_threadsafe(self._end, work)

    def _end(self, work: Future[FinishReason]) -> None:
        self._items.put_nowait(work)
        self._ended.set()

    async def next(self) -> tuple[list[Token], FinishReason | None]:
        """Wait for tokens; return all that are there, and the finish reason with the last.

        A token that ends the answer waits for the reason: a frontend that knows the end token leaves with it.
        Raises what the thread raised, once its tokens are read. Work that was cancelled before it
        began has the reason "cancelled".
        """
        tokens: list[Token] = []
        item = await self._items.get()
        while not isinstance(item, Future):
            tokens.append(item)
            if self._items.empty() and not self._outcome_follows:
                return tokens, None
            item = await self._items.get()
        if item.cancelled():
            return tokens, "cancelled"
        if tokens and item.exception() is not None:
            self._items.put_nowait(item)
            return tokens, None
        return tokens, item.result()

    async def wait_ended(self) -> None:
        """Wait until the thread has left the request."""
        await self._ended.wait()


class AnswerEnd(StoppingCriteria):  # type: ignore[misc]
    """Sees every new token: emits it and decides whether the answer ends there.

    `reason` says why, "length" until something else was seen. A stop token or string counts once
    `min_tokens` tokens are there, and a string only where its last character came with the newest
    token. Tokens of the stop string are emitted: a frontend that detokenises (Dynamo's does) trims them.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        stop_token_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        stream: TokenStream,
        logprobs: ModelsLogprobs | None,
    ) -> None:
        self._sampling = sampling = prepared.sampling
        self._constraint = prepared.constraint
        self._stop_token_ids = frozenset(stop_token_ids)
        self._tokenizer = tokenizer
        self._prompt_tokens = prepared.prompt_tokens
        self._stream = stream
        self._logprobs = logprobs
        # Every token stands for a byte at least, so a stop string lies within as many tokens as it has bytes.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 1
        self.reason: FinishReason = "length"

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Return `[batch]` of bool: True ends the answer."""
        del scores, kwargs
        ended = self.reason != "length"
        # On cuda, generate looks at the answer one step late and then takes that step back.
        if not ended:
            answer = input_ids[0, self._prompt_tokens :]
            token = int(answer[-1])
            if self._constraint is not None:
                self._constraint.take(token)
            ended = self._ends(answer)
            self._stream.put((token, self._logprobs and self._logprobs.at(token)), last=ended)
        return torch.full((input_ids.shape[0],), ended, device=input_ids.device)

    def _ends(self, answer: torch.Tensor) -> bool:
        if self._stream.cancelled:
            self.reason = "cancelled"
        elif len(answer) >= self._sampling.min_tokens and self._stops(answer[-self._window :].tolist()):
            self.reason = "stop"
        return self.reason != "length"

    def _stops(self, newest: list[int]) -> bool:
        if newest[-1] in self._stop_token_ids or (self._constraint and self._constraint.ended):
            return True
        if not self._sampling.stop:
            return False
        with_last, without_last = self._tokenizer.decode(newest), self._tokenizer.decode(newest[:-1])
        return any(with_last.count(text) > without_last.count(text) for text in self._sampling.stop)
