"""Tokens to text, piece by piece, and the stop strings that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """Decodes one answer and ends it before the first stop string. For one answer, in one thread.

    Text is held back while it may be the beginning of a stop string, or while the bytes of a character are
    not all there; an answer that ends in the middle of a character ends before it.
    """

    def __init__(
        self, tokenizer: Any, prompt_tail: Sequence[int], stop: Sequence[str], *, skip_special_tokens: bool
    ) -> None:
        """`tokenizer` is one of the tokenizers library; `prompt_tail` are the prompt's last tokens.

        Some tokenizers decode a token otherwise where nothing comes before it: without the space it has.
        """
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(list(prompt_tail), skip_special_tokens)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens add; "" once a stop string was met (`stopped`)."""
        if self.stopped:
            return ""
        pieces = [self._decoder.step(self._tokenizer, token) for token in token_ids]
        text = "".join(piece for piece in pieces if piece)
        return self._until_stop(text) if self._stop else text

    def end(self) -> str:
        """Return what was held back, when no more tokens come."""
        held, self._held = self._held, ""
        return held

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
