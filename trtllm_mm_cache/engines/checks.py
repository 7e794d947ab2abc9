"""What every engine checks of a request and of an embedding, and what of its library's words clients read."""

from __future__ import annotations

import math
import re

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import SamplingParams
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidRequestError

GREEDY_BELOW = 1e-5
"""A lower temperature would overflow the logits; it means greedy."""

MOST_LOGPROBS = 20
"""Most alternatives that a request may ask for at each place, as in OpenAI's API."""

MOST_CHOICES = 128
"""Most answers that a request may ask for, as in OpenAI's API."""

_MOST_CHARACTERS = 200

# A path, an address in memory, a name in the library, an object's repr: nothing for clients.
_INSIDES = re.compile(r"[/\\<>]|0x[0-9a-fA-F]|\b\w+\.\w+\(|\w::\w|\b_\w|Traceback|object at")


def check_sampling(sampling: SamplingParams) -> None:
    """Raise `InvalidRequestError` for a value that no sampler accepts, naming the field."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    checks = {
        "max_tokens must be at least 1": sampling.max_tokens is None or sampling.max_tokens >= 1,
        "min_tokens must not be negative": sampling.min_tokens >= 0,
        "temperature must be a number from 0": temperature is None
        or (math.isfinite(temperature) and temperature >= 0),
        "top_p must be above 0 and at most 1": top_p is None or 0 < top_p <= 1,
        "top_k must be at least 1, or 0 or -1 for all tokens": top_k is None or top_k >= -1,
        "seed must fit into 64 bits": sampling.seed is None or -(2**63) <= sampling.seed < 2**64,
        "stop must not hold an empty string": all(sampling.stop),
        "presence_penalty must be from -2 to 2": -2 <= sampling.presence_penalty <= 2,
        "frequency_penalty must be from -2 to 2": -2 <= sampling.frequency_penalty <= 2,
        "repetition_penalty must be from 0.01 to 100": 0.01 <= sampling.repetition_penalty <= 100,
        "min_p must be from 0 to 1": 0 <= sampling.min_p <= 1,
        "logit_bias must be from -100 to 100": all(
            -100 <= bias <= 100 for bias in sampling.logit_bias.values()
        ),
        f"logprobs must be from 0 to {MOST_LOGPROBS}": sampling.logprobs is None
        or 0 <= sampling.logprobs <= MOST_LOGPROBS,
        f"prompt_logprobs must be from 0 to {MOST_LOGPROBS}": sampling.prompt_logprobs is None
        or 0 <= sampling.prompt_logprobs <= MOST_LOGPROBS,
    }
    for rule, holds in checks.items():
        if not holds:
            raise InvalidRequestError(rule)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError("min_tokens must not be larger than max_tokens")


def check_one_choice(sampling: SamplingParams) -> None:
    """Raise `InvalidRequestError` for more than one answer: for engines that give one."""
    if sampling.choices != 1:
        raise InvalidRequestError(
            "n: this server's engine gives one answer a request; leave it out, or ask several times"
        )


def check_no_prompt_logprobs(sampling: SamplingParams) -> None:
    """Raise `InvalidRequestError` for log probabilities of the prompt: for engines that report none."""
    if sampling.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs: this server's engine does not report them; leave it out, or serve with vllm"
        )


def grid_of(
    metadata: EmbeddingMetadata, rows: int, merge_size: int, item_index: int | None = None
) -> tuple[int, int, int]:
    """Return the grid `[t, h, w]` in patches, `merge_size**2` of which make one of the `rows` rows.

    Raises `EmbeddingMismatchError` when there is none or it gives another number of rows.
    """
    grid = metadata.grid_thw
    if grid is None:
        raise EmbeddingMismatchError("the embedding has no grid of patches", item_index=item_index)
    if math.prod(grid) != rows * merge_size**2:
        raise EmbeddingMismatchError(
            f"the grid {list(grid)} does not give {rows} rows", item_index=item_index
        )
    return grid


def fit_for_client(error: Exception, otherwise: str) -> str:
    """Return the first line of `error` if it speaks of the request alone, else `otherwise`.

    Libraries refuse in words that help ("prompt length 9000 exceeds 8192"), and in words that show their
    insides. Whoever calls this keeps the whole error as the cause, so that the log has it.
    """
    line = str(error).strip().partition("\n")[0]
    fit = 0 < len(line) <= _MOST_CHARACTERS and line.isprintable() and not _INSIDES.search(line)
    return line if fit else otherwise
