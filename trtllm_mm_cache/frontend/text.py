"""Tokens to text, piece by piece, and the stop strings that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from tokenizers.decoders import DecodeStream

_MOST_PENDING: Final = 32
"""Tokens without text yet. Each more costs as much as all before it: the stream decodes them all anew."""

_CHARACTER_BYTES: Final = 4
"""Of UTF-8: as many tokens may be one character."""

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


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
        self._skip = skip_special_tokens
        self._stop = tuple(stop)
        self._context = list(prompt_tail)
        while self._context and self._decoded(self._context).endswith(_INCOMPLETE):
            self._context.pop()  # the stream would take it for the answer's
        self._before = len(self._decoded(self._context))
        self._decoder = DecodeStream(self._context, self._skip)
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens add; "" once a stop string was met (`stopped`)."""
        if self.stopped:
            return ""
        text = "".join(map(self._step, token_ids))
        return self._until_stop(text) if self._stop else text

    def end(self) -> str:
        """Return what was held back, when no more tokens come."""
        held, self._held = self._held, ""
        return held

    def _step(self, token_id: int) -> str:
        if piece := self._next(token_id):
            self._pending.clear()
            return piece
        self._pending.append(token_id)
        return self._without_pending() if len(self._pending) >= _MOST_PENDING else ""

    def _without_pending(self) -> str:
        """Return the text of tokens that no character will come of, but for the last few."""
        tokens, whole = self._pending, self._after_context(self._pending)
        for at in range(len(tokens) - _CHARACTER_BYTES + 1, len(tokens) + 1):
            text, self._pending = self._after_context(tokens[:at]), tokens[at:]
            if text + self._after_context(self._pending) == whole:
                break  # no character goes across
        self._decoder = DecodeStream(self._context, self._skip)
        for token_id in self._pending:
            self._next(token_id)
        return text

    def _next(self, token_id: int) -> str | None:
        try:
            return self._decoder.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - a bare one: with this token, earlier ones decode to another text
            # Bytes that were a character are none beside a byte that is none, to tokenizers like Llama 2's.
            self._decoder = DecodeStream(self._context, self._skip)
            return self._decoder.step(self._tokenizer, token_id)

    def _after_context(self, token_ids: Sequence[int]) -> str:
        return self._decoded([*self._context, *token_ids])[self._before :]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skip))

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        # The one that was whole first, so that it does not matter in which pieces the text comes.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
