"""Log probabilities of a request's prompt as clients get them: in vLLM's form, and out of others' way.

Both functions take long for a prompt of thousands of tokens: they are for a thread.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def prompt_logprobs_field(
    positions: Sequence[Mapping[str, Any] | None] | None, tokenizer: Any
) -> dict[str, Any]:
    """Return the field that holds what a PD worker said of each token; {} where it said nothing.

    Of each token but the first an object, from token id to log probability, rank and text. `tokenizer` is one
    of the tokenizers library.
    """
    if positions is None:
        return {}
    text = functools.cache(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))
    described = [
        position and {name: {**entry, "decoded_token": text(int(name))} for name, entry in position.items()}
        for position in positions
    ]
    return {"prompt_logprobs": described}


def json_in_steps(content: Any) -> bytes:
    """Return `content` as JSON without keeping other threads from running meanwhile: for a thread.

    What `json.dumps` does in one call of C, and other threads wait for, this does in Python, step by step.
    """
    return "".join(_ENCODER.iterencode(content)).encode(errors="replace")
