"""The log probabilities of a request's prompt: how many a PD worker makes, and how they travel.

They go in the form of Dynamo's workers, as `engine_data.prompt_logprobs`: one object a token of the prompt,
from token id to log probability and rank, and null for the first. A prompt with images has thousands of
tokens, so the entries are counted before the engine is asked. Our own frontend gets them in several messages:
each holds the event loops of both processes while Dynamo's runtime converts it. Dynamo's frontend gets them
in one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from trtllm_mm_cache.engines.base import PromptLogprobs, SamplingParams
from trtllm_mm_cache.errors import InvalidRequestError
from trtllm_mm_cache.runtime.admission import Admission

_PIECE_ENTRIES: Final = 4096
"""Some milliseconds of an event loop."""


class PromptLogprobsLimit:
    """Bounds what prompts' log probabilities take of a worker. For use from one event loop.

    Each request may have `most` entries, 0 for none at all, and a few requests at a time may ask for them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.admission = Admission.of_prompt_logprobs()

    @contextmanager
    def admitted(self, sampling: SamplingParams, prompt_tokens: int) -> Iterator[None]:
        """Count a request, whose prompt has `prompt_tokens` tokens, while the block runs.

        Raises `InvalidRequestError` when it asks for too much, `OverloadedError` when others do already.
        """
        asked = sampling.prompt_logprobs
        if asked is None:
            yield
            return
        if self._most == 0:
            raise InvalidRequestError("prompt_logprobs: this server does not report them; leave it out")
        entries = prompt_tokens * (asked + 1) * sampling.choices
        if entries > self._most:
            raise InvalidRequestError(
                f"prompt_logprobs: {prompt_tokens} tokens, those of images included, with {asked + 1} "
                f"entries of each and n {sampling.choices} are {entries}, more than the {self._most} that "
                "one request may have here; ask for fewer, or send a shorter prompt or smaller images"
            )
        with self.admission.admitted():
            yield


async def messages_of(told: PromptLogprobs, *, in_pieces: bool) -> list[dict[str, Any]]:
    """Return the messages that bring them: several for our own frontend, one for Dynamo's."""
    positions = await asyncio.to_thread(_positions, told)
    step = max(1, _PIECE_ENTRIES // told.width) if in_pieces else len(positions)
    return [
        {"token_ids": [], "engine_data": {"prompt_logprobs": positions[first : first + step]}}
        for first in range(0, len(positions), step)
    ]


def _positions(told: PromptLogprobs) -> list[dict[str, dict[str, float]] | None]:
    width = told.width
    return [
        None,
        *(
            {
                str(told.token_ids[at]): {"logprob": told.logprobs[at], "rank": told.ranks[at]}
                for at in range(first, first + width)
            }
            for first in range(0, len(told.token_ids), width)
        ),
    ]
